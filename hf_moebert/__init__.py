"""Compress pre-trained transformers with the stock Hugging Face tools, and measure what it brought."""

from importlib.util import find_spec

import lazy_loader


if find_spec("torch"):  # without it there are no models to register, and `hf_moebert.runtime` runs exported ones
    from . import registration  # noqa: F401 - registers our classes with transformers and PEFT


__version__ = "0.2.0.dev0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)  # the public names stand in `__init__.pyi`
