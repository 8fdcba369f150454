"""Requests: the size of their headers and bodies, and the folders that they may name."""

import asyncio
from pathlib import Path, PurePath
from typing import Any, TypeVar

from fastapi import HTTPException, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from starlette.types import ASGIApp, Receive, Scope, Send

from .limits import ServingLimits


CLOSE = {"Connection": "close"}  # what follows on this connection may be the rest of a body
Body = TypeVar("Body", bound=BaseModel)


def describe_refusal(detail: str, **more: str) -> dict[str, str]:
    """Return the body of a refusal, whose reason the clients of OpenAI and of the Hub look for under other names."""
    return {"detail": detail, "message": detail, "error_description": detail} | more


async def answer_refusal(_: Request, error: Any) -> JSONResponse:
    """Answer a request that was refused by an `HTTPException`."""
    return JSONResponse(describe_refusal(str(error.detail)), error.status_code, error.headers)


class HeaderLimitMiddleware:
    """Middleware that refuses large headers which came at once: h11 refuses those only that come in parts."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 400 to a request with too large headers, and pass others on."""
        if scope["type"] == "http" and _count_header_bytes(scope) > self.limit:
            refusal = describe_refusal(f"The headers must have at most {self.limit} bytes.")
            return await JSONResponse(refusal, 400, CLOSE)(scope, receive, send)
        return await self.app(scope, receive, send)


def _count_header_bytes(scope: Scope) -> int:
    """Count the bytes of target and headers as they were sent, but for blanks that may be left out."""
    target = len(scope.get("raw_path") or b"") + len(scope["query_string"])
    return target + sum(len(name) + len(value) + len(": \r\n") for name, value in scope["headers"])


class BodyReader:
    """Reads bodies of requests within the limits of size and time, whatever their headers claim.

    Args:
        limits: Limits, of which `max_body_bytes` and `timeout_s` apply.
    """

    def __init__(self, limits: ServingLimits) -> None:
        self._limit, self._seconds = limits.max_body_bytes, limits.timeout_s
        self._reading: set[asyncio.Timeout] = set()
        self._closing = False

    def close(self, seconds: float) -> None:
        """Refuse every body that is not whole by now, and wait at most some seconds for its end."""
        self._closing, self._seconds = True, min(seconds, self._seconds)
        latest = asyncio.get_running_loop().time() + self._seconds
        for reading in self._reading:
            reading.reschedule(min(latest, reading.when() or latest))

    async def read(self, request: Request, form: type[Body]) -> Body:
        """Read and validate a body.

        Raises:
            HTTPException: With status 400, 408, 413 or 422 if it is refused, and with 503 once the reader is closed.
        """
        body, late = await self._receive(request)
        if self._closing:
            raise HTTPException(503, "The server is closing. Ask another one.", CLOSE)
        if late:
            raise HTTPException(408, f"The body must arrive within {self._seconds} seconds.", CLOSE)
        try:
            return form.model_validate_json(body)
        except ValidationError as error:
            found = error.errors(include_url=False, include_context=False, include_input=False)
            status = 400 if found[0]["type"] == "json_invalid" else 422
            reasons = "; ".join(f"{'.'.join(map(str, one['loc'])) or 'body'}: {one['msg']}" for one in found[:3])
            raise HTTPException(status, f"{reasons:.500}") from error

    async def _receive(self, request: Request) -> tuple[bytes, bool]:
        """Return a body, and whether it is cut because it came too slowly."""
        body = bytearray()
        patience = asyncio.timeout(self._seconds)
        try:
            async with patience:
                self._reading.add(patience)
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > self._limit:
                        raise HTTPException(413, f"The body must have at most {self._limit} bytes.", CLOSE)
        except TimeoutError:
            return bytes(body), True
        finally:
            self._reading.discard(patience)
        return bytes(body), False


async def wait_for_departure(request: Request) -> None:
    """Return once the client of a request, whose body was read, has closed its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def count_characters(inputs: Any) -> int:
    """Count the characters of an input, plus one for each of its parts."""
    if isinstance(inputs, str):
        return len(inputs)
    return sum(count_characters(part) + 1 for part in (inputs.values() if isinstance(inputs, dict) else inputs))


def folder_inside(root: Path, folder: str) -> Path:
    """Return a folder below a directory that neither is reached through links nor contains any.

    Raises:
        HTTPException: With status 422 for any other folder.
    """
    parts = PurePath(folder).parts
    path = [root.joinpath(*parts[: number + 1]) for number in range(len(parts))]
    try:
        allowed = bool(parts) and not PurePath(folder).is_absolute() and ".." not in parts and path[-1].is_dir()
        linked = allowed and any(part.is_symlink() for part in (*path, *path[-1].rglob("*")))
    except (OSError, ValueError):  # too long, or with a null character
        allowed, linked = False, False
    if not allowed or linked:
        raise HTTPException(
            422, "`folder` must be a folder in the directory of updates, relative to it, without `..` and links."
        )
    return path[-1]
