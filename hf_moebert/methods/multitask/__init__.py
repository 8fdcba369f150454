"""Many tasks on one frozen BERT: a trunk that runs once, and a short branch for every task."""

import lazy_loader


__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)  # the public names stand in `__init__.pyi`
