"""Dynamic batching: requests are gathered into batches for one worker thread."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from typing import Any, Self

from .limits import ServingLimits


class QueueFull(RuntimeError):  # named as in the standard library's asyncio
    """The queue is full; try again later."""


class BatcherClosed(RuntimeError):
    """The batcher accepts no more requests."""


@dataclass(eq=False)
class _Waiting:
    """An entry of the queue: a request, or a call that must run between two batches."""

    request: Any
    size: int
    length: int
    group: str = ""
    call: Callable[[], Any] | None = None
    future: Future = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)


class DynamicBatcher:
    """A worker thread that answers requests in batches, the oldest first; it starts with the first of them.

    The worker starts a batch once `max_batch` inputs wait, or once the oldest request has waited `max_wait_ms`; at
    once if the last request was alone, for it has nobody to wait for. If more wait than fit, the oldest request is
    joined by those closest to it in length, so that padding is small and no request starves. All requests of a batch
    are of one group. A batch that fails is run again request by request, so that only the faulty request fails. Calls
    given to `between` keep their place in the queue: requests accepted before them are answered before them, requests
    accepted after them are answered after them.

    Whatever a batch raises, a `BaseException` too, ends in the futures of its requests. Should the worker end for any
    other reason, `dead` is true, and all that waited fails.

    Args:
        run: Answers a list of requests of one group with a list of results, in order; an exception in the place of a
            result is that request's alone. Runs in the worker thread only.
        limits: Limits, of which `max_batch`, `max_wait_ms`, `max_waiting` and `timeout_s` apply.
    """

    def __init__(
        self,
        run: Callable[[list[Any]], Sequence[Any]],
        limits: ServingLimits,
    ) -> None:
        self.max_batch, self.max_waiting = limits.max_batch, limits.max_waiting
        self._run, self._max_wait, self._timeout = run, limits.max_wait_ms / 1000, limits.timeout_s
        self._waiting: deque[_Waiting] = deque()
        self._size = 0  # waiting inputs
        self._calls = 0  # waiting calls
        self._alone = False  # whether the last batch was of one request, and nothing waited behind it
        self._started: float | None = None  # of the batch that runs
        self._closed = False
        self._changed = threading.Condition()
        self._worker: threading.Thread | None = None  # until the first request: a fork takes no threads with it

    @property
    def depth(self) -> int:
        """Number of waiting inputs."""
        return self._size

    @property
    def alive(self) -> bool:
        """True as long as requests are accepted and answered."""
        return not (self._closed or self.dead or self.stuck)

    @property
    def dead(self) -> bool:
        """True once the worker ended, be it closed or not."""
        return self._closed if self._worker is None else not self._worker.is_alive()

    @property
    def stuck(self) -> bool:
        """True while a batch runs for longer than a request waits, so that no answer would come in time."""
        started = self._started
        return started is not None and time.monotonic() - started > self._timeout

    def submit(self, request: Any, *, size: int = 1, length: int = 0, group: str = "") -> Future:
        """Queue a request; `asyncio.wrap_future` makes its future awaitable.

        Cancelling the future withdraws a request that waits, and gives its seats in the queue back at once.

        Args:
            request: Element of the list that `run` takes.
            size: Number of inputs; a request is never split between batches.
            length: Length of the longest input, in any unit.
            group: What may share a batch: the name of a model.

        Returns:
            The future of its result.

        Raises:
            ValueError: If the request is larger than a batch.
            QueueFull: If the queue has no room for it.
            BatcherClosed: After `close`.
        """
        if not 1 <= size <= self.max_batch:
            raise ValueError(f"`size` must be in [1, {self.max_batch}], got {size}. Send larger requests in parts.")
        with self._changed:
            if self._size + size > self.max_waiting:
                raise QueueFull(f"The queue holds {self._size} of at most {self.max_waiting} inputs. Try again later.")
            return self._append(_Waiting(request, size, length, group))

    def between(self, call: Callable[[], Any]) -> Future:
        """Queue a call that the worker makes between two batches.

        Returns:
            The future of its result.

        Raises:
            BatcherClosed: After `close`.
        """
        with self._changed:
            return self._append(_Waiting(None, 0, 0, call=call))

    def stop(self) -> None:
        """Accept no more requests; the worker answers those accepted, and ends."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def close(self) -> None:
        """Accept no more requests, answer those accepted, and wait until the worker has ended."""
        self.stop()
        if self._worker is not None:
            self._worker.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, entry: _Waiting) -> Future:
        if self._closed:
            raise BatcherClosed("This batcher is closed. Make a new one.")
        if self._worker is None:
            self._worker = threading.Thread(target=self._work, name="batcher", daemon=True)
            self._worker.start()
        self._waiting.append(entry)
        self._count(entry, 1)
        self._changed.notify_all()
        entry.future.add_done_callback(lambda future: self._withdraw(entry) if future.cancelled() else None)
        return entry.future

    def _withdraw(self, entry: _Waiting) -> None:
        """Take a cancelled entry out of the queue; one that was taken for a batch is not there."""
        with self._changed:
            if entry in self._waiting:
                self._waiting.remove(entry)
                self._count(entry, -1)

    def _count(self, entry: _Waiting, sign: int) -> None:
        self._size += sign * entry.size
        self._calls += sign * (entry.call is not None)

    def _work(self) -> None:
        try:
            while batch := self._take():
                if live := [entry for entry in batch if entry.future.set_running_or_notify_cancel()]:
                    self._started = time.monotonic()
                    self._answer(live)
                    self._started = None
        finally:
            self._abandon()

    def _abandon(self) -> None:
        """Fail what still waits when the worker ends: nothing, unless it ended by a fault."""
        with self._changed:
            self._closed = True
            left = list(self._waiting)
        for entry in left:
            if entry.future.set_running_or_notify_cancel():
                entry.future.set_exception(BatcherClosed("The worker of this batcher has ended. Make a new one."))

    def _take(self) -> list[_Waiting]:
        """Wait for the next batch; an empty one ends the worker."""
        with self._changed:
            while not self._closed and (patience := self._patience()) != 0:
                self._changed.wait(patience)
            batch = self._choose() if self._waiting else []
            for entry in batch:
                self._waiting.remove(entry)
                self._count(entry, -1)
            self._alone = len(batch) == 1 and not self._waiting
            return batch

    def _patience(self) -> float | None:
        """Return the seconds until the next batch starts, `None` while nothing waits."""
        if not self._waiting:
            return None
        if self._calls or self._alone or self._size >= self.max_batch:
            return 0
        return max(0, self._waiting[0].since + self._max_wait - time.monotonic())

    def _choose(self) -> list[_Waiting]:
        first = self._waiting[0]
        if first.call is not None:
            return [first]
        before = next((number for number, entry in enumerate(self._waiting) if entry.call), len(self._waiting))
        candidates = [entry for entry in list(self._waiting)[1:before] if entry.group == first.group]
        if first.size + sum(entry.size for entry in candidates) > self.max_batch:
            candidates.sort(key=lambda entry: abs(entry.length - first.length))  # stable: of equal ones, the older
        batch, room = [first], self.max_batch - first.size
        for entry in candidates:
            if entry.size <= room:
                batch.append(entry)
                room -= entry.size
        return batch

    def _answer(self, batch: list[_Waiting]) -> None:
        try:
            results = self._results(batch)
        except BaseException as error:  # noqa: BLE001  # a tokenizer's panic is no `Exception`; all go through the future
            if len(batch) == 1:
                batch[0].future.set_exception(_passable(error))
            else:  # find the faulty request
                for entry in batch:
                    self._answer([entry])
        else:
            for entry, result in zip(batch, results, strict=True):
                if isinstance(result, Exception):
                    entry.future.set_exception(_passable(result))
                else:
                    entry.future.set_result(result)

    def _results(self, batch: list[_Waiting]) -> list[Any]:
        if (call := batch[0].call) is not None:
            return [call()]
        results = list(self._run([entry.request for entry in batch]))
        if len(results) != len(batch):
            raise RuntimeError(f"`run` must return a result for each of {len(batch)} requests, got {len(results)}.")
        return results


def _passable(error: BaseException) -> Exception:
    """Return an error that a future can carry and that ends no event loop, with the original as its cause."""
    if isinstance(error, Exception) and not isinstance(error, (StopIteration, CancelledError)):
        return error
    failure = RuntimeError(f"The batch ended with {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure
