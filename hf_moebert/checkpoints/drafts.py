"""Write files and folders beside their places, and move them there when they are whole; without torch."""

import glob
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError


CHECKSUM = "sha256"  # the entry of a file that holds the checksum of the others


@contextmanager
def replacing(file: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a draft beside a file, which takes its place when the block ends, and is removed if the block fails.

    Raises:
        OSError: If it cannot be written; an earlier file stays as it was.
    """
    with drafting(file) as draft:
        yield draft
        sync(draft)
        draft.replace(file)
        if os.name == "posix":  # elsewhere folders cannot be opened
            sync(Path(file).parent)


@contextmanager
def drafting(place: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a hidden name beside a file for a draft of it, a file or a folder, which is removed when the block ends.

    Drafts of processes of this machine that were killed are removed, too.

    Raises:
        OSError: If the block fails to write.
    """
    place = Path(place)
    draft = place.with_name(f".{place.name}.{platform.node()}-{os.getpid()}.draft")
    with naming(place):
        try:
            for path in place.parent.glob(f".{glob.escape(place.name)}.{platform.node()}-*.draft"):
                if not _is_running(int(path.name.removesuffix(".draft").rpartition("-")[2])):
                    _remove(path)
            yield draft
        finally:
            _remove(draft)


@contextmanager
def naming(place: str | os.PathLike[str]) -> Iterator[None]:
    """Name a file or folder in the errors of a block that writes it.

    Raises:
        OSError: If the block fails to write.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"{str(place)!r} cannot be written: {error}. Free some space, or choose another folder."
        ) from error


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_running(process: int) -> bool:
    """Return whether another process of this machine runs, as far as it can be told."""
    return process != os.getpid() and (not os.path.isdir("/proc/self") or os.path.isdir(f"/proc/{process}"))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        path.unlink()
