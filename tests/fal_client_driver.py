"""What fal's own client makes of the mock: every call once, and what came of it as one line of JSON.

The environment says where fal is and with which key. `tests/it/python.rs` runs it and judges.
"""

import asyncio
import json
import os
import socket
import ssl

import fal_client

APP = "fal-ai/flux/dev"
INPUT = {"prompt": "a cat"}


def outcome(call):
    try:
        return call()
    except fal_client.FalClientHTTPError as error:
        return {"status": error.status_code, "message": error.message, "error_type": error.error_type}
    except Exception as error:  # a refused stream or socket has an error of its own library
        return {"error": type(error).__name__}


def statuses(handle):
    return [type(status).__name__ for status in handle.iter_events(with_logs=True, interval=0)]


def queued():
    handle = fal_client.submit(APP, INPUT)
    return {"statuses": statuses(handle), "result": handle.get(interval=0)}


def by_id():
    request_id = fal_client.submit(APP, INPUT).request_id
    first = fal_client.status(APP, request_id)
    return {"status": type(first).__name__, "result": fal_client.result(APP, request_id)}


def cancelled():
    handle = fal_client.submit(APP, INPUT)
    handle.cancel()
    return {"again": outcome(handle.cancel), "result": outcome(handle.get)}


def realtime():
    """With the key in the handshake. The client speaks msgpack, and the mock sends it back as it came."""
    with fal_client.realtime(APP, use_jwt=False, max_buffering=1) as connection:
        connection.send(INPUT)
        return connection.recv()


def strict_tls():
    """The checks that Python 3.13 has switched on for everyone."""
    context = ssl.create_default_context(cafile=os.environ["SSL_CERT_FILE"])
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    host, port = os.environ["FAL_RUN_HOST"].split("/")[0].split(":")
    with socket.create_connection((host, int(port))) as plain:
        with context.wrap_socket(plain, server_hostname=host) as stream:
            return stream.version()


async def asynchronous():
    ran = await fal_client.run_async(APP, INPUT)
    events = [event["event"] async for event in fal_client.stream_async(APP, INPUT)]
    return {"run": ran, "events": events, "subscribe": await fal_client.subscribe_async(APP, INPUT)}


print(
    json.dumps(
        {
            "tls": outcome(strict_tls),
            "run": outcome(lambda: fal_client.run(APP, INPUT)),
            "stream": outcome(lambda: list(fal_client.stream(APP, INPUT))),
            "queued": outcome(queued),
            "by_id": outcome(by_id),
            "cancelled": outcome(cancelled),
            "subscribe": outcome(lambda: fal_client.subscribe(APP, INPUT)),
            "realtime": outcome(realtime),
            "asynchronous": outcome(lambda: asyncio.run(asynchronous())),
        }
    )
)
