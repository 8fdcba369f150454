"""Let one process at a time write to a folder."""

import os
from pathlib import Path

from filelock import AcquireReturnProxy, FileLock, Timeout


LOCK_FILE = "_training.lock"  # the Trainer does not push names with an underscore


def lock_folder(folder: str | os.PathLike[str]) -> AcquireReturnProxy:
    """Take the lock of a folder, which the process gives back, or loses by ending in any way.

    Whoever has it may take it again, and gives it back as often.

    Args:
        folder: Folder to lock; it is made if it does not exist.

    Returns:
        A context manager that gives the lock back at its end, as does its `lock.release()`.

    Raises:
        ValueError: If another process, or another thread of this one, has the lock.
        OSError: If the folder cannot be written to.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        return FileLock(Path(folder).resolve() / LOCK_FILE, is_singleton=True).acquire(timeout=0)
    except Timeout as error:
        raise ValueError(
            f"`output_dir` must be the folder of one run at a time, but another run writes to {str(folder)!r} now. "
            "Wait for its end, or choose another folder."
        ) from error
    except OSError as error:
        raise OSError(
            f"`output_dir` must be a folder that can be written to, got {str(folder)!r}: {error}. Choose another one."
        ) from error
