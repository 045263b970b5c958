"""fal's own package, unchanged, as the tests of the login drive it: `python fal_tools.py COMMAND`.

It reads its settings from the environment, as fal's package does. A line on stdin lets it go on.
"""

import sys


def hold():
    """Takes the lock of fal's tools, and holds it until there is a line on stdin."""
    from fal.auth import local

    with local.lock_token():
        print("held", flush=True)
        sys.stdin.readline()
    print("released", flush=True)


def try_lock():
    """Says for each line on stdin whether the lock of fal's tools is free."""
    import portalocker
    from fal.auth import local

    path = str(local._check_dir_exist() / local._LOCK_FILE)
    print("ready", flush=True)
    for _ in sys.stdin:
        try:
            with portalocker.utils.TemporaryFileLock(path, fail_when_locked=False, timeout=0.3):
                print("free", flush=True)
        except portalocker.exceptions.LockException:
            print("busy", flush=True)


def resolve():
    """Prints what the SDK would send, and the account."""
    from fal.sdk import get_credentials

    headers = {name.lower(): value for name, value in get_credentials().to_headers().items()}
    print("found", headers["authorization"], headers.get("x-fal-user-id"), flush=True)


def client():
    """Prints what fal's other Python client would send."""
    from fal_client.auth import fetch_auth_credentials

    print("found", fetch_auth_credentials().header_value, flush=True)


def cli():
    """The command line, with the rest of the arguments."""
    from fal.cli.main import main

    sys.exit(main(sys.argv[2:]))


{"hold": hold, "try": try_lock, "resolve": resolve, "client": client, "cli": cli}[sys.argv[1]]()
