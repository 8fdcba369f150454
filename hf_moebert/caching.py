"""Keep what is made from weights, until the weights change."""

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor


SAMPLES = 4  # elements of a weight that are looked at for changes which torch does not count

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

    Edits through `.data` raise no version, so values are compared too; not on other devices, where that would wait.
    """

    __slots__ = ("address", "sample", "values", "version")

    def __init__(self, source: Tensor) -> None:
        self.address, self.version = source.data_ptr(), 0 if source.is_inference() else source._version
        self.sample: Tensor | None = None  # an alias: as long as it lives, no other tensor gets this address
        if source.device.type == "cpu":
            sample = source.detach()
            if sample.is_contiguous():
                sample = sample.view(-1)
            while sample.dim() > 1:
                sample = sample.select(-1, 0)
            self.sample = sample[:: max(sample.numel() // SAMPLES, 1)] if sample.dim() else sample
            self.values = self.sample.tolist()

    def fits(self, source: Tensor) -> bool:
        """Say whether the tensor still looks so."""
        return (
            source.data_ptr() == self.address
            and (0 if source.is_inference() else source._version) == self.version
            and (self.sample is None or self.sample.tolist() == self.values)
        )
