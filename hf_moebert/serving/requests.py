"""What a server takes on: how much, of which form, and from which folders."""

import asyncio
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Annotated, Any, TypeVar

from fastapi import HTTPException, Request
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError


FAIL_FAST = Field(fail_fast=True)  # a message about each of a million wrong elements would be work for nothing
Name = Annotated[str, StringConstraints(min_length=1, max_length=100)]
Part = str | Annotated[list[str], FAIL_FAST]
Input = str | Annotated[dict[Name, Part], Field(fail_fast=True, max_length=4)]
Body = TypeVar("Body", bound=BaseModel)


@dataclass(frozen=True)
class ServingLimits:
    """What a server takes on.

    Attributes:
        max_batch: Inputs of a batch, and of one request.
        max_wait_ms: Milliseconds that a request waits for company.
        queue_size: Inputs that may wait; what comes then is refused.
        max_body_bytes: Of a request.
        max_characters: Of an input.
        timeout_s: Seconds until a request is given up.

    Raises:
        ValueError: If a number is too small.
    """

    max_batch: int = 32
    max_wait_ms: float = 5.0
    queue_size: int = 256
    max_body_bytes: int = 1_000_000
    max_characters: int = 20_000
    timeout_s: float = 30.0

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "max_characters", "timeout_s"):
            if (value := getattr(self, name)) <= 0:
                default = type(self).__dataclass_fields__[name].default
                raise ValueError(f"`{name}` must be above 0, got {value}. Use {default}.")


class PredictRequest(BaseModel):
    """Body of POST /predict."""

    model_config = ConfigDict(extra="forbid", strict=True)
    inputs: Input | Annotated[list[Input], FAIL_FAST]
    tasks: Annotated[list[Name], Field(fail_fast=True, min_length=1)] | None = None


class UpdateRequest(BaseModel):
    """Body of PUT /tasks/{name}."""

    model_config = ConfigDict(extra="forbid", strict=True)
    folder: str


async def read_body(request: Request, form: type[Body], limits: ServingLimits) -> Body:
    """Read a body that is not too large, whatever its headers claim, and not too slow.

    Raises:
        HTTPException: With status 400, 408, 413 or 422 otherwise.
    """
    body, limit = bytearray(), limits.max_body_bytes
    try:
        async with asyncio.timeout(limits.timeout_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise HTTPException(413, f"The body must have at most {limit} bytes.", {"Connection": "close"})
    except TimeoutError as error:
        raise HTTPException(408, f"The body must arrive within {limits.timeout_s} seconds.") from error
    try:
        return form.model_validate_json(bytes(body))
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        status = 400 if found[0]["type"] == "json_invalid" else 422
        said = "; ".join(f"{'.'.join(map(str, one['loc'])) or 'body'}: {one['msg']}" for one in found[:3])
        raise HTTPException(status, f"{said:.500}") from error


def count_characters(inputs: Any) -> int:
    """Return how many characters an input has in all, a blank after each part of it included."""
    if isinstance(inputs, str):
        return len(inputs)
    return sum(count_characters(part) + 1 for part in (inputs.values() if isinstance(inputs, dict) else inputs))


def folder_inside(root: Path, folder: str) -> Path:
    """Return a folder below a directory, if no link leads to it or out of it.

    Raises:
        HTTPException: With status 422 otherwise.
    """
    parts = PurePath(folder).parts
    way = [root.joinpath(*parts[: number + 1]) for number in range(len(parts))]
    try:
        allowed = bool(parts) and not PurePath(folder).is_absolute() and ".." not in parts and way[-1].is_dir()
        linked = allowed and any(path.is_symlink() for path in (*way, *way[-1].rglob("*")))
    except (OSError, ValueError):  # too long, or with a null character
        allowed, linked = False, False
    if not allowed or linked:
        raise HTTPException(
            422, "`folder` must be a folder in the directory of updates, relative to it, without `..` and links."
        )
    return way[-1]
