"""An exported model without torch: ONNX Runtime, tokenizers and numpy."""

import lazy_loader


__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)  # the public names stand in `__init__.pyi`
