"""Cache values derived from weights until the weights change."""

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor


SAMPLES = 8  # elements of a weight compared to find edits that torch does not count: each read may miss the cache
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # what numpy knows, by bytes

Value = TypeVar("Value")


class Derived(Generic[Value]):
    """A value derived from tensors without gradients, rebuilt once one of them is replaced or edited.

    Copies and pickles start empty.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Drop the value."""
        self.value: Value | None = None
        self._fingerprints: list[Fingerprint] = []

    def get(self, sources: Sequence[Tensor], make: Callable[[], Value]) -> Value:
        """Return the value, built by `make` if the sources have changed since it was built.

        Args:
            sources: All tensors that the value depends on.
            make: Called without gradients but outside of inference mode, so that gradients may flow past its result.
        """
        if self.value is None or not self.is_current(sources):
            with torch.inference_mode(False), torch.no_grad():
                self.value = make()
            self._fingerprints = [Fingerprint(source) for source in sources]
        return self.value

    def is_current(self, sources: Sequence[Tensor]) -> bool:
        """Check whether the sources are the tensors the value was built from, with the same values."""
        fingerprints = self._fingerprints
        return len(fingerprints) == len(sources) and all(
            fingerprint.matches(source) for fingerprint, source in zip(fingerprints, sources, strict=True)
        )

    def __reduce__(self) -> tuple:
        return Derived, ()


class Fingerprint:
    """A fingerprint of a tensor: its address, its version and the bits of a few of its values.

    Edits through `.data` do not raise the version, so values are compared, too: an edit of all elements is noticed,
    one of a single element may not be. Values are compared on the CPU only: elsewhere that would wait for the device.
    """

    __slots__ = ("address", "alias", "bits", "version")

    def __init__(self, source: Tensor) -> None:
        self.address, self.version = source.data_ptr(), 0 if source.is_inference() else source._version
        self.alias: Any = source.detach()  # as long as it lives, no other tensor gets this address
        self.bits: bytes | None = None
        if source.device.type == "cpu":
            # The same memory as numpy, which reads a few values in a tenth of the time that torch needs
            self.alias = self._sample(self.alias).view(INTEGERS[source.itemsize]).numpy()
            self.bits = self.alias.tobytes()

    @staticmethod
    def _sample(values: Tensor) -> Tensor:
        count = max(SAMPLES, len(values)) if values.dim() > 4 else SAMPLES  # of a stack, one of each expert at least
        if values.is_contiguous():
            values = values.view(-1)
        while values.dim() > 1:
            values = values.select(-1, 0)
        return values[:: max(values.numel() // count, 1)]

    def matches(self, source: Tensor) -> bool:
        """Check whether a tensor still has this fingerprint."""
        return (
            source.data_ptr() == self.address
            and (0 if source.is_inference() else source._version) == self.version
            and (self.bits is None or self.alias.tobytes() == self.bits)
        )
