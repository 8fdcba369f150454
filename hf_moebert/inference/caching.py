"""Keep what is made from weights, until the weights change."""

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor


SAMPLES = 8  # elements of a weight that are looked at for changes which torch does not count: each may miss the cache

Made = TypeVar("Made")


class Derived(Generic[Made]):
    """Something made from tensors without gradients, made anew once one of them is another or has other values.

    Copies and pickles start empty.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget what was made."""
        self.made: Made | None = None
        self._traces: list[Trace] = []

    def get(self, sources: Sequence[Tensor], make: Callable[[], Made]) -> Made:
        """Return what `make` returned when the sources were as they are now.

        Args:
            sources: All tensors that it is made from.
            make: Called without gradients, outside of inference mode: what it returns may meet gradients later.
        """
        if self.made is None or not self.is_current(sources):
            with torch.inference_mode(False), torch.no_grad():
                self.made = make()
            self._traces = [Trace(source) for source in sources]
        return self.made

    def is_current(self, sources: Sequence[Tensor]) -> bool:
        """Say whether the sources are the ones it was made from, and of the same values."""
        traces = self._traces
        return len(traces) == len(sources) and all(
            trace.fits(source) for trace, source in zip(traces, sources, strict=True)
        )

    def __reduce__(self) -> tuple:
        return Derived, ()


class Trace:
    """What a tensor looked like: where it lay, how often it was written, and a few of its values.

    Edits through `.data` raise no version, so values are compared too: an edit of all elements is seen, one of a
    single element may not be. On other devices values are not compared, because that would wait for the device.
    """

    __slots__ = ("address", "alias", "values", "version")

    def __init__(self, source: Tensor) -> None:
        self.address, self.version = source.data_ptr(), 0 if source.is_inference() else source._version
        self.alias = source.detach()  # as long as it lives, no other tensor gets this address
        self.values: list[float] | None = None
        if source.device.type == "cpu":
            self.alias = self._sample(self.alias)
            self.values = self.alias.tolist()

    @staticmethod
    def _sample(values: Tensor) -> Tensor:
        count = max(SAMPLES, len(values)) if values.dim() > 4 else SAMPLES  # of a stack, one of each expert at least
        if values.is_contiguous():
            values = values.view(-1)
        while values.dim() > 1:
            values = values.select(-1, 0)
        return values[:: max(values.numel() // count, 1)]

    def fits(self, source: Tensor) -> bool:
        """Say whether the tensor still looks so."""
        return (
            source.data_ptr() == self.address
            and (0 if source.is_inference() else source._version) == self.version
            and (self.values is None or self.alias.tolist() == self.values)
        )
