"""Keys of clients: read from a file, and compared in constant time."""

import hashlib
import hmac
from collections.abc import Sequence
from pathlib import Path

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from .requests import describe_refusal


OPEN = {("GET", "/health"), ("HEAD", "/health"), ("GET", "/"), ("GET", "/docs"), ("GET", "/openapi.json")}
SHORTEST = 16  # characters; shorter ones can be guessed
REFUSAL = "A key is needed: send `Authorization: Bearer KEY` with one that this server knows."


class KeyMiddleware:
    """Middleware that refuses requests without a key, but for the health of the server and its pages.

    Args:
        app: Application behind it.
        keys: Keys that are known; only their digests are kept.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self.app, self.digests = app, [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 401 to a request without a key, and pass others on."""
        if scope["type"] == "http" and (scope["method"], scope["path"]) not in OPEN and not self._knows(scope):
            headers = {"WWW-Authenticate": "Bearer", "Connection": "close"}
            return await JSONResponse(describe_refusal(REFUSAL), 401, headers)(scope, receive, send)
        return await self.app(scope, receive, send)

    def _knows(self, scope: Scope) -> bool:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        digest = _digest(key.strip())  # digests have one length: not even that of a key shows in the time
        found = [hmac.compare_digest(digest, known) for known in self.digests]
        return scheme.lower() == b"bearer" and any(found)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def read_keys(file: Path) -> list[str]:
    """Read the keys of a file, one a line.

    Raises:
        ValueError: If there is none, or one is too short or not of printable ASCII; the message shows none.
        OSError: If it cannot be read.
    """
    try:
        keys = [line.strip() for line in file.read_text(encoding="ascii").splitlines() if line.strip()]
    except UnicodeDecodeError:
        keys = [""]
    if not keys or any(len(key) < SHORTEST or not key.isprintable() or " " in key for key in keys):
        raise ValueError(
            f"{str(file)!r} must hold keys of at least {SHORTEST} printable ASCII characters without blanks, one a "
            "line. Make one by `openssl rand -hex 32`."
        )
    return keys
