"""MoEBERT: the feed-forward networks of a fine-tuned encoder become experts, and one runs per token."""

import lazy_loader


__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)  # the public names stand in `__init__.pyi`
