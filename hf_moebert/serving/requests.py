"""Bodies of requests: their form, their size, and the folders that they may name."""

import asyncio
from pathlib import Path, PurePath
from typing import Annotated, Any, TypeVar

from fastapi import HTTPException, Request
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from .limits import ServingLimits


FAIL_FAST = Field(fail_fast=True)  # a message for each of a million wrong elements would waste time
Name = Annotated[str, StringConstraints(min_length=1, max_length=100)]
Part = str | Annotated[list[str], FAIL_FAST]
Input = str | Annotated[dict[Name, Part], Field(fail_fast=True, max_length=4)]
Body = TypeVar("Body", bound=BaseModel)


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
    """Read and validate a body, within the limits of size and time, whatever its headers claim.

    Raises:
        HTTPException: With status 400, 408, 413 or 422 if it is refused.
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
        reasons = "; ".join(f"{'.'.join(map(str, one['loc'])) or 'body'}: {one['msg']}" for one in found[:3])
        raise HTTPException(status, f"{reasons:.500}") from error


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
