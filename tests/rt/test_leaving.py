"""Cancelling, errors and closing: the next request never notices."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from dflash_rt.backends.scripted import ScriptedBackend, follow
from dflash_rt.errors import (
    GeneratorStateError,
    NumericalError,
)
from dflash_rt.generator import Generator
from dflash_rt.stream import GenerationResult, TokenStream
from tests.rt.scripted_generator import (
    encode,
    limits,
    scripted_generator,
)

ANSWER = "Rayleigh scattering: é, €, 🙂.\n\nAsk more."
IDS = encode(ANSWER)

# Cancelling, errors, and the generator after them


def leave_by_break(generator: Generator, after: int) -> None:
    for count, _ in enumerate(generator.stream([1])):
        if count == after:
            break


def leave_by_close(generator: Generator, after: int) -> None:
    stream = generator.stream([1])
    chunks = [next(stream) for _ in range(after)]
    stream.close()
    stream.close()
    assert list(stream) == []
    assert stream.result.finish_reason == "cancelled"
    assert stream.result.text == "".join(chunk.text for chunk in chunks)
    assert stream.result.token_ids == tuple(token for chunk in chunks for token in chunk.token_ids)
    assert stream.result.stats.steps == max(0, after - 1)


def leave_by_context(generator: Generator, after: int) -> None:
    with generator.stream([1]) as stream:
        for _ in range(after):
            next(stream)
    assert stream.result.finish_reason == "cancelled"


def leave_by_collection(generator: Generator, after: int) -> None:
    stream = generator.stream([1])
    for _ in range(after):
        next(stream)
    alive = weakref.ref(stream)
    cycle: list[object] = [stream]
    cycle.append(cycle)
    del stream, cycle
    gc.collect()
    assert alive() is None


def leave_by_exception(generator: Generator, after: int) -> None:
    def loop() -> None:
        with generator.stream([1]) as stream:
            for count, _ in enumerate(stream):
                if count == after:
                    raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        loop()


def leave_at_the_end(generator: Generator, after: int) -> None:
    assert generator.generate([1], max_new_tokens=after + 1).finish_reason == "length"


LEAVING = [
    leave_by_break,
    leave_by_close,
    leave_by_context,
    leave_by_collection,
    leave_by_exception,
    leave_at_the_end,
]


@pytest.mark.parametrize("leave", LEAVING)
def test_reuse_after_leaving_anywhere(leave: Callable[[Generator, int], None]) -> None:
    with scripted_generator(ANSWER) as generator:
        for after in range(7):
            leave(generator, after)
            assert generator.generate([1], max_new_tokens=9).token_ids == tuple(IDS[:9])


@pytest.mark.parametrize("call", range(6))
@pytest.mark.parametrize("error", [NumericalError("not finite"), RuntimeError("vendor"), KeyboardInterrupt()])
def test_reuse_after_an_error_anywhere(call: int, error: BaseException) -> None:
    with scripted_generator(ANSWER, prompt=IDS[:10], raise_at={call: error}) as generator:
        with pytest.raises(type(error)) as caught:
            generator.generate(IDS[:10])
        assert caught.value is error
        assert generator.generate(IDS[:10]).text == ANSWER


def test_a_stream_that_failed() -> None:
    with scripted_generator(ANSWER, raise_at={1: NumericalError("not finite")}) as generator:
        stream = generator.stream([1])
        next(stream)
        with pytest.raises(NumericalError):
            next(stream)
        assert list(stream) == []
        stream.close()
        with pytest.raises(GeneratorStateError, match="it ended with an error"):
            _ = stream.result


def test_no_result_before_the_end() -> None:
    with scripted_generator(ANSWER) as generator, generator.stream([1]) as stream:
        for moment in ("before the first chunk", "after it"):
            with pytest.raises(GeneratorStateError, match="it hasn't ended"):
                _ = stream.result
            if moment == "before the first chunk":
                next(stream)


def test_a_stream_that_never_ran_costs_nothing() -> None:
    with scripted_generator(ANSWER) as generator:
        waiting = generator.stream([1])
        assert generator.generate([1], max_new_tokens=2).token_ids == tuple(IDS[:2])
        waiting.close()
        assert waiting.result == GenerationResult("", (), "cancelled", waiting.result.stats)
        assert waiting.result.stats.as_dict()["prefill_seconds"] == 0.0


def test_closing_from_inside_a_step_ends_the_stream_after_it() -> None:
    streams: list[TokenStream] = []

    def target(prefix: tuple[int, ...]) -> int:
        if len(prefix) == 4:
            streams[0].close()
        return len(prefix)

    generator = Generator.from_parts(limits(), ScriptedBackend(target, lambda prefix, count: [0] * count))
    streams.append(generator.stream([1], speculative=False))
    assert [chunk.token_ids for chunk in streams[0]] == [(1,), (2,), (3,), (4,)]
    assert streams[0].result.finish_reason == "cancelled"
    assert streams[0].result.token_ids == (1, 2, 3, 4)


def test_next_from_inside_a_step_is_refused() -> None:
    streams: list[TokenStream] = []
    generator = Generator.from_parts(limits(), ScriptedBackend(lambda prefix: len(list(streams[0]))))
    streams.append(generator.stream([1]))
    with pytest.raises(GeneratorStateError, match="from inside the stream's own step"):
        next(streams[0])


# Lifecycle


def test_close() -> None:
    generator = scripted_generator(ANSWER)
    backend: Any = generator._backend
    waiting = generator.stream([1])
    assert not generator.closed
    generator.close()
    generator.close()
    assert generator.closed
    assert backend.closed
    for use in (
        lambda: generator.generate([1]),
        lambda: generator.stream([1]),
        lambda: next(waiting),
        generator.__enter__,
    ):
        with pytest.raises(GeneratorStateError, match="the generator is closed"):
            use()


def test_the_backend_is_closed_once() -> None:
    closed: list[bool] = []

    class Watched(ScriptedBackend):
        def close(self) -> None:
            closed.append(True)

    with Generator.from_parts(limits(), Watched(follow([0]))) as generator:
        generator.close()
    assert closed == [True]


def test_close_ends_this_thread_s_open_stream() -> None:
    generator = scripted_generator(ANSWER)
    stream = generator.stream([1])
    first = next(stream)
    generator.close()
    assert stream.result.finish_reason == "cancelled"
    assert stream.result.token_ids == first.token_ids
    assert list(stream) == []


def test_leaving_the_context_by_an_error_with_an_open_stream() -> None:
    generator = scripted_generator(ANSWER)

    def loop() -> None:
        with generator:
            for _ in generator.stream([1]):
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        loop()
    assert generator.closed


def test_close_from_inside_a_step_is_refused() -> None:
    generators: list[Generator] = []

    def target(prefix: tuple[int, ...]) -> int:
        if not generators[0].closed:
            generators[0].close()
        return 0

    generators.append(Generator.from_parts(limits(), ScriptedBackend(target)))
    with pytest.raises(GeneratorStateError, match="from inside one of its own steps"):
        generators[0].generate([1])
    generators[0].close()
    assert generators[0].closed
