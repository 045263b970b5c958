"""Makes `vectors.json`: deliveries as fal signs them, and as others might, by an implementation that is not ours.

    python3 -m venv target/python && target/python/bin/pip install cryptography==48.0.0
    target/python/bin/python tests/webhook/make_vectors.py > tests/webhook/vectors.json

Each vector has the headers as a list, the body in base64, the time at which it is judged, a set of keys, and the expected
reason; `null` is a delivery that must be believed. The script gives the same file each time.
"""

import base64
import hashlib
import json
import sys

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

NOW = 1_800_000_000
USER = "github|12345"
REQUEST = "764cabcf-b745-4b3e-ae38-1200304cf45b"
BODY = b'{"request_id":"764cabcf-b745-4b3e-ae38-1200304cf45b","status":"OK","payload":{"seed": 1.0}}'
# The order of the base point.
L = 2**252 + 27742317777372353535851937790883648493
P = 2**255 - 19


def key(name):
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest())


def raw(private):
    return private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)


def jwk(public):
    return {"kty": "OKP", "crv": "Ed25519", "x": base64.urlsafe_b64encode(public).rstrip(b"=").decode()}


FIRST, SECOND, STRANGER = key("first"), key("second"), key("stranger")

# The neutral element, twice: as it has to be written, and with a number that is as large as the modulus.
NEUTRAL = (1).to_bytes(32, "little")
NEUTRAL_TOO_LARGE = (P + 1).to_bytes(32, "little")
# A point of order 8 (RFC 8032 allows it, a strict reader does not).
ORDER_8 = bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05")

SETS = {
    "two keys": [jwk(raw(FIRST)), jwk(raw(SECOND))],
    "among others": [
        {"kty": "RSA", "n": "AQAB", "e": "AQAB", "alg": "RS256", "use": "sig"},
        {"kty": "EC", "crv": "P-256", "x": "AAAA", "y": "AAAA"},
        {"kty": "OKP", "crv": "X25519", "x": jwk(raw(STRANGER))["x"]},
        {"kty": "OKP", "crv": "Ed25519", "x": jwk(raw(STRANGER))["x"], "use": "enc"},
        {"kty": "OKP", "crv": "Ed25519", "x": jwk(raw(STRANGER))["x"][:-2]},
        {"kty": "OKP", "crv": "Ed25519", "x": jwk(raw(STRANGER) + b"\0")["x"]},
        {"kty": "OKP", "crv": "Ed25519", "x": "!"},
        {"kty": "OKP", "crv": "Ed25519"},
        "a string",
        jwk(raw(FIRST)),
    ],
    "weak keys": [jwk(NEUTRAL), jwk(NEUTRAL_TOO_LARGE), jwk(ORDER_8), jwk(raw(FIRST))],
}


def message(request=REQUEST, user=USER, timestamp=str(NOW), body=BODY):
    return "\n".join([request, user, timestamp, hashlib.sha256(body).hexdigest()]).encode()


def headers(signature, request=REQUEST, user=USER, timestamp=str(NOW)):
    return [
        ["x-fal-webhook-request-id", request],
        ["x-fal-webhook-user-id", user],
        ["x-fal-webhook-timestamp", timestamp],
        ["x-fal-webhook-signature", signature],
    ]


def signed(by=FIRST, body=BODY, **what):
    return headers(by.sign(message(body=body, **what)).hex(), **what)


VECTORS = []


def vector(name, heads, reason=None, body=BODY, now=NOW, keys="two keys"):
    body = base64.b64encode(body).decode()
    VECTORS.append({"name": name, "headers": heads, "body": body, "now": now, "keys": keys, "reason": reason})


GOOD = signed()
SIGNATURE = dict(GOOD)["x-fal-webhook-signature"]


def with_value(name, value):
    return [[n, value if n.endswith(name) else v] for n, v in GOOD]


def spelled_with_zeros():
    return signed(timestamp="00" + str(NOW))


# What must be believed.
vector("good", GOOD)
vector("signed with the second key", signed(SECOND))
vector("the only key of its kind in the set", GOOD, keys="among others")
vector("headers in another order", GOOD[::-1])
vector("header names in capitals", [[n.upper(), v] for n, v in GOOD])
vector("header names in mixed case", [["X-Fal-Webhook-" + n[14:].title(), v] for n, v in GOOD])
vector("signature in capitals", with_value("signature", SIGNATURE.upper()))
vector("other headers besides", GOOD + [["content-type", "application/json"], ["x-fal-webhook", "x"]])
vector("empty body", signed(body=b""), body=b"")
vector("binary body", signed(body=bytes(range(256))), body=bytes(range(256)))
vector("body of four KiB", signed(body=b"a" * 4096), body=b"a" * 4096)
vector("300 s old", GOOD, now=NOW + 300)
vector("300 s ahead", GOOD, now=NOW - 300)
vector("timestamp with zeros before it", spelled_with_zeros())
vector("ids of 256 characters", signed(request="r" * 256, user=USER))

# What nobody has signed.
vector("body of another delivery", GOOD, "bad_signature", body=BODY.replace(b"1.0", b"2.0"))
vector("json written again", GOOD, "bad_signature", body=json.dumps(json.loads(BODY)).encode())
vector("json written again without blanks", GOOD, "bad_signature",
       body=json.dumps(json.loads(BODY), separators=(",", ":")).encode())
vector("body with a line break at its end", GOOD, "bad_signature", body=BODY + b"\n")
vector("another request id", with_value("request-id", REQUEST[::-1]), "bad_signature")
vector("another user id", with_value("user-id", USER + "6"), "bad_signature")
vector("another timestamp", with_value("timestamp", str(NOW + 1)), "bad_signature")
vector("timestamp with zeros that were not signed", with_value("timestamp", "0" + str(NOW)), "bad_signature")
vector("signed with the key of a stranger", signed(STRANGER), "bad_signature")
vector("signed with a key that is for encryption", signed(STRANGER), "bad_signature", keys="among others")
vector("hash of the body in capitals",
       headers(FIRST.sign("\n".join([REQUEST, USER, str(NOW), hashlib.sha256(BODY).hexdigest().upper()]).encode()).hex()),
       "bad_signature")
vector("message with a line feed at its end", headers(FIRST.sign(message() + b"\n").hex()), "bad_signature")
vector("signature of the body alone", headers(FIRST.sign(BODY).hex()), "bad_signature")
bits = bytearray.fromhex(SIGNATURE)
for at in [0, 31, 32, 63]:
    bits[at] ^= 1
    vector(f"signature with another bit in byte {at}", with_value("signature", bits.hex()), "bad_signature")
    bits[at] ^= 1
large = int.from_bytes(bits[32:], "little") + L
vector("non-canonical s", with_value("signature", (bytes(bits[:32]) + large.to_bytes(32, "little")).hex()),
       "bad_signature")
vector("signature of zeros", with_value("signature", "00" * 64), "bad_signature")
vector("signature of ones", with_value("signature", "ff" * 64), "bad_signature")
for name, point in [("neutral element", NEUTRAL), ("neutral element, too large", NEUTRAL_TOO_LARGE), ("order 8", ORDER_8)]:
    forged = (point + bytes(32)).hex()
    vector(f"small-order r: {name}", with_value("signature", forged), "bad_signature")
    vector(f"small-order r and key: {name}", with_value("signature", forged), "bad_signature", keys="weak keys")
vector("good, beside weak keys", GOOD, keys="weak keys")

# What fal has signed, and is not to be believed.
vector("301 s old", GOOD, "stale", now=NOW + 301)
vector("301 s ahead", GOOD, "stale", now=NOW - 301)
vector("in the year 1970", GOOD, "stale", now=0)
vector("signed at 0", signed(timestamp="0"), "stale")
vector("signed at the end of time", signed(timestamp=str(2**64 - 1)), "stale")
vector("another account", signed(user="github|99999"), "other_account")
vector("the account in capitals", signed(user=USER.upper()), "other_account")

# Headers. All are signed, so that nothing but their form can be wrong.
for index, (name, value) in enumerate(GOOD):
    vector(f"without {name}", GOOD[:index] + GOOD[index + 1:], "missing_header")
    vector(f"two of {name}", GOOD + [[name, value]], "repeated_header")
    vector(f"two of {name}, in another case", GOOD + [[name.upper(), "x"]], "repeated_header")
    vector(f"empty {name}", with_value(name, ""), "invalid_header")
for timestamp in [f"+{NOW}", f"-{NOW}", f" {NOW}", f"{NOW} ", f"{NOW}.0", f"{NOW}e0", f"{NOW}L", hex(NOW), "1_800_000_000",
                  str(2**64), "9" * 21, "0" * 21, "now"]:
    vector(f"timestamp `{timestamp}`", signed(timestamp=timestamp), "invalid_header")
for name, value in [("one digit", "a"), ("an odd number of digits", SIGNATURE[:-1]), ("63 bytes", SIGNATURE[:-2]),
                    ("65 bytes", SIGNATURE + "00"), ("a blank before it", " " + SIGNATURE),
                    ("0x before it", "0x" + SIGNATURE[2:]), ("a sign in a digit's place", "+" + SIGNATURE[1:]),
                    ("base64", base64.b64encode(bytes.fromhex(SIGNATURE)).decode()), ("g in it", "g" + SIGNATURE[1:]),
                    ("two in one header", SIGNATURE + "," + SIGNATURE)]:
    vector(f"signature: {name}", with_value("signature", value), "invalid_header")
for name, value in [("a blank", "a b"), ("257 characters", "r" * 257), ("a tab", "a\tb")]:
    vector(f"request id with {name}", signed(request=value), "invalid_header")
    vector(f"user id with {name}", signed(user=value), "invalid_header")
# One message could be read in two ways.
moved = headers(FIRST.sign(message()).hex(), request=REQUEST + " " + USER, user=str(NOW))
vector("parts of the message moved", moved, "invalid_header")

json.dump({"accounts": [USER], "sets": {name: {"keys": keys} for name, keys in SETS.items()}, "vectors": VECTORS},
          sys.stdout, indent=1)
print()
