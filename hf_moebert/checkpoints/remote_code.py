"""Refuse folders that bring code of their own: nothing here runs it, or asks whether to."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from typing import Any

from transformers import PretrainedConfig
from transformers.integrations.hub_kernels import is_kernel
from transformers.utils import CONFIG_NAME, cached_file
from transformers.utils.peft_utils import ADAPTER_SAFE_WEIGHTS_NAME, find_adapter_config_file


@contextmanager
def refuse_code(source: str | PathLike[str]) -> Iterator[None]:
    """Refuse a source that runs code when it is loaded, and name a remedy.

    The calls inside pass `trust_remote_code=False`; left out, transformers would ask at the terminal. What that does
    not cover is refused at once: kernels that config.json names, and adapters in pickles.

    Args:
        source: Folder or Hub id that is loaded inside.

    Raises:
        ValueError: If it cannot be loaded without code of its own, or without reading a pickle.
        OSError: If it has no configuration.
    """
    _check_files(source)
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{str(source)!r} must load without code of its own, which is never run. Import the package that its "
            "classes come from, or save it as a class of transformers or of this package."
        ) from error


def _check_files(source: str | PathLike[str]) -> None:
    adapter = find_adapter_config_file(str(source))
    if adapter is not None:
        if not _has_file(source, ADAPTER_SAFE_WEIGHTS_NAME):
            raise ValueError(
                f"{str(source)!r} must hold its adapter as {ADAPTER_SAFE_WEIGHTS_NAME}: pickles are never read. Load "
                "it where it was made, and save it again."
            )
        if not _has_file(source, CONFIG_NAME):
            with open(adapter, encoding="utf-8") as stream:
                source = json.load(stream)["base_model_name_or_path"]  # which transformers loads, then
    description, _ = PretrainedConfig.get_config_dict(source)
    if kernels := sorted(_find_kernels(description)):
        raise ValueError(
            f"{str(source)!r} must load without code of its own, which is never run, but its {CONFIG_NAME} names the "
            f"kernels {kernels}. Remove them from it: the implementations of transformers give the same results."
        )


def _has_file(source: str | PathLike[str], name: str) -> bool:
    return cached_file(source, name, _raise_exceptions_for_missing_entries=False) is not None


def _find_kernels(value: Any) -> set[str]:
    """Find the kernels of the Hub that a configuration names for its attention or its experts, at any depth."""
    found: set[str] = set()
    for key, inner in value.items() if isinstance(value, dict) else ():
        names = inner.values() if isinstance(inner, dict) else [inner]
        if key.endswith("_implementation"):
            found |= {name for name in names if isinstance(name, str) and is_kernel(name.rpartition("|")[2])}
        found |= _find_kernels(inner)
    return found
