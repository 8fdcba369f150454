"""Write JSON files entirely or not at all, and read them only if they are as they were written."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .drafts import CHECKSUM, replacing


def save_json(file: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write an object with a checksum: entirely, or not at all.

    Args:
        file: File to write, in a folder that exists.
        content: What JSON can hold.

    Raises:
        OSError: If it cannot be written; an earlier file stays as it was.
    """
    with replacing(file) as draft:
        draft.write_text(json.dumps({**content, CHECKSUM: _digest(content)}, indent=1) + "\n", encoding="utf-8")


def read_json(file: str | os.PathLike[str], *, remedy: str) -> dict[str, Any]:
    """Read what `save_json` wrote, or an object without a checksum.

    Args:
        file: File to read.
        remedy: What to do if it cannot be read: a sentence for the error message.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged.
    """
    if not Path(file).exists():
        raise FileNotFoundError(f"{str(file)!r} must be a JSON file, but does not exist. {remedy}")
    try:
        content = dict(json.loads(Path(file).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{str(file)!r} must hold a JSON object, but it does not: {error}. {remedy}") from error
    expected = content.pop(CHECKSUM, None)
    if expected not in (None, found := _digest(content)):
        raise ValueError(
            f"{str(file)!r} must be as it was written, with the SHA-256 {expected}, but has {found}: it is damaged. "
            f"{remedy}"
        )
    return content


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
