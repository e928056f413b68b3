"""One generator, several threads. Waits have limits so that a deadlock fails instead of hanging."""

from __future__ import annotations

import gc
import random
import threading
import time
import zlib
from collections.abc import Callable
from typing import Any

import pytest

from dflash_rt.backends.scripted import ScriptedBackend
from dflash_rt.errors import BackendError, GeneratorStateError
from dflash_rt.generator import Generator
from dflash_rt.stream import TokenStream
from tests.rt.scripted_generator import limits, scripted_generator

PATIENCE = 20.0  # seconds until a wait counts as a deadlock


class Task(threading.Thread):
    """Runs a function; :meth:`result` gives what it gave or raises what it raised."""

    def __init__(self, function: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._function = function
        self._value: Any = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._value = self._function()
        except BaseException as error:  # noqa: BLE001 - handed on by result()
            self._error = error

    def result(self) -> Any:
        self.join(PATIENCE)
        assert not self.is_alive(), "deadlock"
        if self._error is not None:
            raise self._error
        return self._value


class Gate:
    """A target that stops at a prefix of ``rows`` tokens until it is let on."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.reached = threading.Event()
        self.open = threading.Event()

    def __call__(self, prefix: tuple[int, ...]) -> int:
        if len(prefix) == self.rows:
            self.reached.set()
            assert self.open.wait(PATIENCE)
        return len(prefix)

    def generator(self) -> Generator:
        return Generator.from_parts(limits(), ScriptedBackend(self, lambda prefix, count: [0] * count))


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "deadlock"
        time.sleep(0.001)


def waits(stream: TokenStream) -> Callable[[], bool]:
    return lambda: stream._state == "waiting"


def hashed(prefix: tuple[int, ...]) -> int:
    return zlib.crc32(repr(prefix).encode()) % 5


def half_right(prefix: tuple[int, ...], count: int) -> list[int]:
    drafted: list[int] = []
    for _ in range(count):
        drafted.append(hashed((*prefix, *drafted)) if len(prefix) % 2 else 3)
    return drafted


def test_results_equal_those_of_one_thread() -> None:
    def ask(generator: Generator, number: int) -> tuple[int, ...]:
        prompt = [number % 5, *range(number % 17)]
        options = {"max_new_tokens": 1 + number % 23, "speculative": number % 3 > 0, "stop_token_ids": [4]}
        if number % 4 == 0:
            with generator.stream(prompt, **options) as stream:  # type: ignore[arg-type]
                for count, _ in enumerate(stream):
                    if count == 2:
                        break
            return stream.result.token_ids
        return generator.generate(prompt, **options).token_ids  # type: ignore[arg-type]

    numbers = list(range(120))
    with Generator.from_parts(limits(), ScriptedBackend(hashed, half_right)) as generator:
        alone = [ask(generator, number) for number in numbers]
    with Generator.from_parts(limits(), ScriptedBackend(hashed, half_right)) as generator:
        results: dict[int, tuple[int, ...]] = {}

        def work(mine: list[int]) -> None:
            for number in mine:
                results[number] = ask(generator, number)

        random.Random(0).shuffle(numbers)
        for task in [Task(lambda mine=numbers[i::6]: work(mine)) for i in range(6)]:  # type: ignore[misc]
            task.result()
    assert [results[number] for number in sorted(numbers)] == alone


def test_a_request_waits_for_another_thread_s_stream() -> None:
    generator = scripted_generator("answer")
    stream = generator.stream([1])
    next(stream)
    later = generator.stream([1])
    task = Task(lambda: "".join(chunk.text for chunk in later))
    until(waits(later))
    assert [chunk.finish_reason for chunk in stream][-1] == "stop"
    assert task.result() == "answer"


def test_a_second_request_of_the_same_thread_is_refused() -> None:
    generator = scripted_generator("answer")
    second = generator.stream([1])

    def nested() -> None:
        for chunk in generator.stream([1]):
            if chunk.finish_reason is not None:
                break  # with its last chunk a stream has given its turn back
            for call in (lambda: generator.generate([1]), lambda: next(second)):
                with pytest.raises(GeneratorStateError, match="this thread has an open stream"):
                    call()

    Task(nested).result()
    # The refusal has left the second one as it was.
    assert "".join(chunk.text for chunk in second) == "answer"


def test_waiting_time_is_not_counted() -> None:
    gate = Gate(2)
    generator = gate.generator()
    first = Task(lambda: generator.generate([0], max_new_tokens=2))
    assert gate.reached.wait(PATIENCE)
    began = time.perf_counter()
    stream = generator.stream([0], max_new_tokens=1)
    second = Task(lambda: list(stream))
    until(waits(stream))
    time.sleep(0.05)
    gate.open.set()
    first.result()
    second.result()
    assert stream.result.stats.prefill_seconds < time.perf_counter() - began - 0.05


def test_a_stream_may_go_on_in_another_thread() -> None:
    generator = scripted_generator("answer")
    stream = generator.stream([1])
    begin = next(stream).text
    assert begin + Task(lambda: "".join(chunk.text for chunk in stream)).result() == "answer"
    assert generator.generate([1]).text == "answer"


def test_the_thread_that_handed_its_stream_on_can_wait_for_it() -> None:
    gate = Gate(3)
    generator = gate.generator()
    stream = generator.stream([0], max_new_tokens=4)
    next(stream)
    task = Task(lambda: len(list(stream)))
    assert gate.reached.wait(PATIENCE)
    opener = threading.Timer(0.02, gate.open.set)
    opener.start()
    assert generator.generate([0], max_new_tokens=3).token_ids == (1, 2, 3)
    assert task.result() == 3
    opener.join(PATIENCE)


def test_closing_a_stream_from_another_thread_lets_the_next_one_in() -> None:
    generator = scripted_generator("answer")
    stream = generator.stream([1])
    next(stream)
    task = Task(lambda: generator.generate([1]).text)
    Task(stream.close).result()
    assert task.result() == "answer"
    assert stream.result.finish_reason == "cancelled"
    assert list(stream) == []


def test_closing_while_a_step_runs_waits_for_the_step() -> None:
    gate = Gate(2)
    generator = gate.generator()
    stream = generator.stream([0])
    task = Task(lambda: [chunk.token_ids for chunk in stream])
    assert gate.reached.wait(PATIENCE)
    closing = Task(stream.close)
    gate.open.set()
    closing.result()
    tokens = tuple(token for ids in task.result() for token in ids)
    assert stream.result.token_ids == tokens
    assert stream.result.finish_reason == "cancelled"
    assert generator.generate([0], max_new_tokens=2).token_ids == (1, 2)


def test_a_stream_closed_while_it_waits_never_runs() -> None:
    gate = Gate(2)
    generator = gate.generator()
    running = Task(lambda: generator.generate([0], max_new_tokens=2))
    assert gate.reached.wait(PATIENCE)
    stream = generator.stream([0])
    task = Task(lambda: list(stream))
    until(waits(stream))
    stream.close()
    assert stream.result.finish_reason == "cancelled"
    calls: Any = generator._backend
    before = calls.calls
    gate.open.set()
    running.result()
    assert task.result() == []
    assert calls.calls == before
    again = Task(lambda: generator.generate([0], max_new_tokens=2).token_ids)
    assert again.result() == (1, 2)


def test_a_waiting_stream_belongs_to_one_thread() -> None:
    gate = Gate(2)
    generator = gate.generator()
    running = Task(lambda: generator.generate([0], max_new_tokens=2))
    assert gate.reached.wait(PATIENCE)
    stream = generator.stream([0], max_new_tokens=3)
    task = Task(lambda: [chunk.token_ids for chunk in stream])
    until(waits(stream))
    with pytest.raises(GeneratorStateError, match="another thread is starting this stream"):
        next(stream)
    gate.open.set()
    running.result()
    assert task.result() == [(1,), (2,), (3,)]


def test_two_threads_may_share_a_stream() -> None:
    generator = Generator.from_parts(limits(), ScriptedBackend(hashed, half_right))
    whole = generator.generate([1], max_new_tokens=100, stop_token_ids=[]).token_ids
    stream = generator.stream([1], max_new_tokens=100, stop_token_ids=[])
    first = next(stream)
    tasks = [Task(lambda: list(stream)) for _ in range(3)]
    shares = [chunk for task in tasks for chunk in task.result()]
    assert sorted(token for chunk in (first, *shares) for token in chunk.token_ids) == sorted(whole)
    assert stream.result.token_ids == whole


def test_a_stream_forgotten_by_a_dead_thread_lets_the_next_one_in() -> None:
    generator = scripted_generator("answer")

    def forget() -> None:
        cycle: list[object] = [generator.stream([1])]
        cycle.append(cycle)
        next(cycle[0])  # type: ignore[call-overload]

    Task(forget).result()
    task = Task(lambda: generator.generate([1]).text)
    gc.collect()
    assert task.result() == "answer"


def test_close_waits_for_the_running_request_and_refuses_the_waiting_ones() -> None:
    gate = Gate(2)
    generator = gate.generator()
    running = Task(lambda: generator.generate([0], max_new_tokens=4).token_ids)
    assert gate.reached.wait(PATIENCE)
    stream = generator.stream([0])
    waiting = Task(lambda: next(stream))
    until(waits(stream))
    closing = [Task(generator.close) for _ in range(2)]
    until(lambda: generator.closed)
    backend: Any = generator._backend
    assert not backend.closed
    gate.open.set()
    for task in closing:
        task.result()
    assert backend.closed
    assert running.result() == (1, 2, 3, 4)
    with pytest.raises(GeneratorStateError, match="the generator is closed"):
        waiting.result()


def test_an_error_in_one_thread_leaves_the_others_alone() -> None:
    def target(prefix: tuple[int, ...]) -> int:
        if prefix[0] == 4 and len(prefix) == 9:
            raise BackendError("no")
        return hashed(prefix)

    generator = Generator.from_parts(limits(stop_token_ids=frozenset()), ScriptedBackend(target, half_right))
    good = [generator.generate([i], max_new_tokens=20).token_ids for i in range(4)]

    def ask(first: int) -> list[tuple[int, ...]]:
        if first < 4:
            return [generator.generate([first], max_new_tokens=20).token_ids for _ in range(5)]
        for _ in range(5):
            with pytest.raises(BackendError, match="no"):
                generator.generate([first], max_new_tokens=20)
        return []

    tasks = [Task(lambda first=first: ask(first)) for first in range(5)]  # type: ignore[misc]
    assert [task.result() for task in tasks] == [*([tokens] * 5 for tokens in good), []]
