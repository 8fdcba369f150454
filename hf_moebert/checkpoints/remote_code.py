"""Explain why a folder that brings its own code is refused: nothing here runs it, or asks whether to."""

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike


@contextmanager
def explain_refused_code(source: str | PathLike[str]) -> Iterator[None]:
    """Name a remedy that exists, where transformers would advise an argument that our callers do not take.

    Calls inside pass `trust_remote_code=False`; left out, transformers would ask at the terminal.

    Args:
        source: Folder or Hub id that is loaded inside.

    Raises:
        ValueError: If it cannot be loaded without code of its own.
    """
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{str(source)!r} must load without code of its own, which is never run. Import the package that its "
            "classes come from, or save it as a class of transformers or of this package."
        ) from error
