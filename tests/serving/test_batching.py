"""Requests are answered in batches: each by its own result, in order, and none is lost."""

import asyncio
import threading
from concurrent.futures import CancelledError

import pytest

from hf_moebert.serving.batching import BatcherClosed, DynamicBatcher, QueueFull
from hf_moebert.serving.limits import ServingLimits


class Gate:
    """Function of batches that records them and waits until it is opened."""

    def __init__(self, answer=lambda request: request * 2):
        self.answer = answer
        self.batches = []
        self.entered, self.open = threading.Event(), threading.Event()

    def __call__(self, requests):
        self.entered.set()
        assert self.open.wait(10)
        self.batches.append(requests)
        return [self.answer(request) for request in requests]


@pytest.fixture
def gate():
    return Gate()


def make_batcher(run, **limits):
    return DynamicBatcher(run, ServingLimits(**limits))


def blocked(gate, **limits):
    """Return a batcher whose worker is busy with the request 0."""
    batcher = make_batcher(gate, **{"max_wait_ms": 0} | limits)
    first = batcher.submit(0)
    assert gate.entered.wait(10)
    return batcher, first


def test_every_request_gets_its_own_answer():
    with make_batcher(lambda batch: [request * 2 for request in batch], queue_size=1000) as batcher:
        futures = [batcher.submit(number) for number in range(1000)]
        assert [future.result(10) for future in futures] == [2 * number for number in range(1000)]


def test_a_batch_starts_full_or_when_the_oldest_waited_long_enough(gate):
    gate.open.set()
    with make_batcher(gate, max_batch=3, max_wait_ms=60_000) as batcher:
        futures = [batcher.submit(number) for number in range(3)]
        assert [future.result(10) for future in futures] == [0, 2, 4]
    with make_batcher(gate, max_batch=3, max_wait_ms=1) as batcher:
        assert batcher.submit(5).result(10) == 10
    assert gate.batches == [[0, 1, 2], [5]]


def test_who_is_alone_waits_for_nobody(gate):
    gate.open.set()
    with make_batcher(gate, max_wait_ms=60_000) as batcher:
        batcher.between(lambda: None).result(10)
        for number in range(3):
            assert batcher.submit(number).result(10) == 2 * number
    assert gate.batches == [[0], [1], [2]]


def test_what_waits_meanwhile_is_one_batch(gate):
    batcher, first = blocked(gate)
    futures = [batcher.submit(number) for number in range(1, 5)]
    assert batcher.depth == 4
    gate.open.set()
    batcher.close()
    assert gate.batches == [[0], [1, 2, 3, 4]]
    assert [future.result(0) for future in (first, *futures)] == [0, 2, 4, 6, 8]
    assert batcher.depth == 0


def test_a_batch_is_of_one_group(gate):
    batcher, _ = blocked(gate)
    for number in range(1, 7):
        batcher.submit(number, group="odd" if number % 2 else "even")
    gate.open.set()
    batcher.close()
    assert gate.batches == [[0], [1, 3, 5], [2, 4, 6]]


def test_an_error_in_the_place_of_a_result_is_that_requests_alone(gate):
    gate.answer = lambda request: ValueError("one") if request == 1 else request
    batcher, first = blocked(gate)
    futures = [batcher.submit(number) for number in range(1, 4)]
    gate.open.set()
    batcher.close()
    assert gate.batches == [[0], [1, 2, 3]]  # nothing runs twice
    assert [future.result(0) for future in (first, *futures[1:])] == [0, 2, 3]
    with pytest.raises(ValueError, match="one"):
        futures[0].result(0)


def test_the_oldest_is_joined_by_its_likes(gate):
    batcher, _ = blocked(gate, max_batch=3)
    for length in (10, 90, 12, 80, 11, 85):
        batcher.submit(length, length=length)
    gate.open.set()
    batcher.close()
    assert gate.batches == [[0], [10, 11, 12], [90, 80, 85]]


def test_large_requests_stay_whole(gate):
    batcher, _ = blocked(gate, max_batch=4)
    for size in (2, 3, 2, 4, 1):
        batcher.submit(size, size=size)
    gate.open.set()
    batcher.close()
    assert gate.batches == [[0], [2, 2], [3, 1], [4]]


def test_one_bad_request_fails_alone():
    def refuse_three(requests):
        if 3 in requests:
            raise ValueError("no threes")
        return requests

    with make_batcher(refuse_three, max_batch=8, max_wait_ms=60_000) as batcher:
        futures = [batcher.submit(number) for number in range(8)]
        results = [future.exception(10) or future.result() for future in futures]
    assert [result for result in results if result is not results[3]] == [0, 1, 2, 4, 5, 6, 7]
    assert isinstance(results[3], ValueError)


def test_an_answer_too_few_is_an_error():
    message = "`run` must return a result for each of 1 requests, got 0"
    with make_batcher(lambda _: [], max_wait_ms=0) as batcher, pytest.raises(RuntimeError, match=message):
        batcher.submit(1).result(10)


def test_a_call_keeps_its_place_between_requests():
    state, gate = ["old"], Gate()
    gate.answer = lambda request: (request, state[0])
    batcher, first = blocked(gate, max_batch=2)
    before = [batcher.submit(number) for number in (1, 2, 3)]
    change = batcher.between(lambda: state.__setitem__(0, "new"))
    broken = batcher.between(lambda: 1 / 0)
    after = batcher.submit(4)
    gate.open.set()
    batcher.close()
    assert [future.result(0) for future in (first, *before)] == [(number, "old") for number in range(4)]
    assert change.result(0) is None
    assert isinstance(broken.exception(0), ZeroDivisionError)
    assert after.result(0) == (4, "new")
    assert gate.batches == [[0], [1, 2], [3], [4]]


def test_a_full_queue_refuses_and_then_takes_again(gate):
    batcher, _ = blocked(gate, max_batch=2, queue_size=2)
    batcher.submit(1)
    with pytest.raises(QueueFull, match="The queue holds 1 of at most 2 inputs"):
        batcher.submit(2, size=2)
    waiting = batcher.submit(3)
    gate.open.set()
    assert waiting.result(10) == 6
    assert batcher.submit(4).result(10) == 8
    batcher.close()


def test_what_was_taken_back_is_not_run(gate):
    batcher, _ = blocked(gate)
    gone, kept = batcher.submit(1), batcher.submit(2)
    assert gone.cancel()
    gate.open.set()
    batcher.close()
    assert gate.batches == [[0], [2]]
    assert kept.result(0) == 4
    with pytest.raises(CancelledError):
        gone.result(0)


def test_what_was_taken_back_gives_its_seats_back_at_once(gate):
    batcher, _ = blocked(gate, max_batch=2, queue_size=2)
    gone = batcher.submit(1, size=2)
    with pytest.raises(QueueFull):
        batcher.submit(2)
    assert gone.cancel()
    assert batcher.depth == 0
    kept = batcher.submit(3, size=2)
    gate.open.set()
    batcher.close()
    assert kept.result(0) == 6
    assert gate.batches == [[0], [3]]


@pytest.mark.parametrize("queue", ["submit", "between"])
def test_the_worker_goes_on_when_all_that_waited_was_taken_back(queue):
    with make_batcher(list, max_batch=2, max_wait_ms=50) as batcher:
        for _ in range(3):
            entry = batcher.submit(1) if queue == "submit" else batcher.between(print)
            entry.cancel()
        assert batcher.submit(2).result(10) == 2
        assert batcher.alive


class Panic(BaseException):
    """As a tokenizer in Rust raises it."""


@pytest.mark.parametrize("error", [Panic, SystemExit, KeyboardInterrupt, StopIteration, CancelledError])
def test_whatever_a_batch_raises_the_worker_goes_on(error):
    def fail_at_three(requests):
        if 3 in requests:
            raise error("no threes")
        return requests

    with make_batcher(fail_at_three, max_batch=4, max_wait_ms=60_000) as batcher:
        futures = [batcher.submit(number) for number in range(4)]
        assert [future.result(10) for future in futures[:3]] == [0, 1, 2]
        with pytest.raises(RuntimeError, match=f"The batch ended with {error.__name__}: no threes"):
            futures[3].result(10)
        assert isinstance(batcher.between(lambda: fail_at_three([3])).exception(10), RuntimeError)
        assert batcher.alive


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_worker_that_ends_fails_what_waits_and_refuses_the_rest(gate, monkeypatch):
    batcher, _ = blocked(gate)
    waiting = batcher.submit(1)
    monkeypatch.setattr(batcher, "_choose", lambda: 1 / 0)
    gate.open.set()
    assert isinstance(waiting.exception(10), BatcherClosed)
    with pytest.raises(BatcherClosed):
        batcher.submit(2)
    batcher.close()
    assert batcher.dead


def test_closing_finishes_what_was_accepted_and_refuses_the_rest(gate):
    batcher, first = blocked(gate, max_batch=2)
    futures = [batcher.submit(number) for number in range(1, 6)]
    closing = threading.Thread(target=batcher.close)
    closing.start()
    while batcher.alive:
        pass
    with pytest.raises(BatcherClosed, match="is closed"):
        batcher.submit(9)
    with pytest.raises(BatcherClosed, match="is closed"):
        batcher.between(print)
    gate.open.set()
    closing.join(10)
    assert [future.result(0) for future in (first, *futures)] == [0, 2, 4, 6, 8, 10]
    batcher.close()  # once more does no harm


def test_many_threads_lose_nothing():
    answers = {}
    with make_batcher(lambda batch: [-request for request in batch], max_batch=7, queue_size=5000) as batcher:

        def ask(start):
            futures = {number: batcher.submit(number, length=number % 5) for number in range(start, start + 200)}
            answers.update({number: future.result(20) for number, future in futures.items()})

        threads = [threading.Thread(target=ask, args=(200 * number,)) for number in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert answers == {number: -number for number in range(2000)}


def test_futures_can_be_awaited():
    async def ask(batcher):
        return await asyncio.gather(*(asyncio.wrap_future(batcher.submit(number)) for number in range(50)))

    with make_batcher(lambda batch: [request + 1 for request in batch]) as batcher:
        assert asyncio.run(ask(batcher)) == list(range(1, 51))


@pytest.mark.parametrize("size", [0, 5])
def test_a_request_fits_a_batch(size):
    with make_batcher(list, max_batch=4) as batcher, pytest.raises(ValueError, match=r"`size` must be in \[1, 4\]"):
        batcher.submit("request", size=size)
