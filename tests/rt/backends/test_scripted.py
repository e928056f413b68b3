"""The fake has to be strict: whatever it lets pass, no loop test will see."""

from __future__ import annotations

import contextlib
import threading

import numpy as np
import pytest

from dflash_rt.arrays import IntArray
from dflash_rt.backends.base import Backend, Inject
from dflash_rt.backends.scripted import ScriptedBackend, follow
from dflash_rt.errors import BackendError, NumericalError


def ints(*values: int) -> IntArray:
    return np.array(values, dtype=np.int64)


def plus_one(prefix: tuple[int, ...]) -> int:
    return prefix[-1] + 1


def wrong_from_third(prefix: tuple[int, ...], count: int) -> list[int]:
    return [prefix[-1] + 1, prefix[-1] + 2, *[0] * (count - 2)][:count]


def prefilled(**options: object) -> ScriptedBackend:
    """Rows 10, 11, 12 are committed with their features; the next anchor is 13 at start 3."""
    backend = ScriptedBackend(plus_one, wrong_from_third, block_size=4, **options)  # type: ignore[arg-type]
    backend.reserve(20)
    assert backend.prefill(ints(10, 11, 12)[None], ints(0), inject=True).tolist() == [13]
    return backend


def stepped(**options: object) -> ScriptedBackend:
    """One step after that: 14 and 15 accepted, bonus 16 at start 6, 4 feature rows from 3 not injected."""
    backend = prefilled(**options)
    output = backend.step(ints(13), ints(3), verify_len=4, inject=None)
    assert output.drafted.tolist() == [[14, 15, 0]]
    assert output.verified.tolist() == [[14, 15, 16, 1]]
    return backend


def test_is_a_backend() -> None:
    backend: Backend = ScriptedBackend(plus_one)
    assert backend.name == "scripted"
    assert list(backend.run_seconds) == ["step"]


def test_right_calls_pass() -> None:
    backend = stepped()
    output = backend.step(ints(16), ints(6), verify_len=4, inject=Inject(ints(3), 4))
    assert output.verified.tolist() == [[17, 18, 19, 1]]
    backend.prefill(ints(10)[None], ints(0), inject=False)  # a new sequence over the old rows
    output = backend.step(ints(11), ints(1), verify_len=1, inject=None)
    assert output.drafted.shape == (1, 0)
    assert output.verified.tolist() == [[12]]
    assert backend.calls == 5


def test_prefill_goes_on_where_it_ended() -> None:
    backend = prefilled()
    assert backend.prefill(ints(20, 21)[None], ints(3), inject=True).tolist() == [22]
    backend.step(ints(22), ints(5), verify_len=4, inject=None)


def test_without_a_drafter_every_draft_is_right() -> None:
    backend = ScriptedBackend(follow([1, 2, 3, 4, 5, 6, 7, 8]), block_size=3)
    backend.reserve(8)
    backend.prefill(ints(1, 2)[None], ints(0), inject=True)
    output = backend.step(ints(3), ints(2), verify_len=3, inject=None)
    assert output.drafted.tolist() == [[4, 5]]
    assert output.verified.tolist() == [[4, 5, 6]]


WRONG_AFTER_PREFILL = {
    "step at a wrong start": (
        lambda b: b.step(ints(13), ints(4), verify_len=4, inject=None),
        "start of a step",
    ),
    "wrong anchor": (lambda b: b.step(ints(14), ints(3), verify_len=4, inject=None), "anchor of a step"),
    "verify_len 0": (lambda b: b.step(ints(13), ints(3), verify_len=0, inject=None), "verify_len of a step"),
    "verify_len over block_size": (
        lambda b: b.step(ints(13), ints(3), verify_len=5, inject=None),
        "verify_len of a step",
    ),
    "inject after a prefill": (
        lambda b: b.step(ints(13), ints(3), verify_len=4, inject=Inject(ints(0), 3)),
        "inject",
    ),
    "anchors without an axis": (
        lambda b: b.step(np.int64(13), ints(3), verify_len=4, inject=None),
        "anchors",
    ),
    "int32": (lambda b: b.step(ints(13), ints(3).astype(np.int32), verify_len=4, inject=None), "start"),
    "two slots": (lambda b: b.step(ints(13, 13), ints(3, 3), verify_len=4, inject=None), "anchors"),
    "prefill with a gap": (lambda b: b.prefill(ints(1)[None], ints(4), inject=True), "start of a prefill"),
    "prefill of nothing": (lambda b: b.prefill(ints()[None], ints(3), inject=True), "token_ids"),
    "prefill over the chunk": (
        lambda b: b.prefill(ints(1, 2, 3, 4)[None], ints(3), inject=True),
        "rows of a prefill",
    ),
    "prefill over the room": (
        lambda b: b.prefill(ints(1, 2, 3)[None], ints(3), inject=True),
        "rows reserved",
    ),
    "reserve over the limit": (lambda b: b.reserve(6), "reserve"),
}


@pytest.mark.parametrize("name", WRONG_AFTER_PREFILL)
def test_refuses_after_a_prefill(name: str) -> None:
    call, what = WRONG_AFTER_PREFILL[name]
    backend = ScriptedBackend(plus_one, wrong_from_third, block_size=4, prefill_chunk=3, max_rows=5)
    backend.reserve(5)
    backend.prefill(ints(10, 11, 12)[None], ints(0), inject=True)
    with pytest.raises(BackendError, match=f"the backend protocol is broken: {what}"):
        call(backend)
    with pytest.raises(BackendError, match="clear first"):
        backend.step(ints(13), ints(3), verify_len=4, inject=None)


WRONG_AFTER_STEP = {
    "injection forgotten": (
        lambda b: b.step(ints(16), ints(6), verify_len=4, inject=None),
        "rows without the features",
    ),
    "not all rows injected": (
        lambda b: b.step(ints(16), ints(6), verify_len=4, inject=Inject(ints(3), 3)),
        "rows of inject",
    ),
    "injected at the new start": (
        lambda b: b.step(ints(16), ints(6), verify_len=4, inject=Inject(ints(6), 4)),
        "start of inject",
    ),
    "rejected row kept": (
        lambda b: b.step(ints(16), ints(7), verify_len=4, inject=Inject(ints(3), 4)),
        "start of a step",
    ),
    "accepted row dropped": (
        lambda b: b.step(ints(15), ints(5), verify_len=4, inject=Inject(ints(3), 4)),
        "start of a step",
    ),
    "features of the prompt": (
        lambda b: b.step(ints(16), ints(6), verify_len=4, inject=Inject(ints(2), 5)),
        "inject",
    ),
    "prefill after a step": (lambda b: b.prefill(ints(1)[None], ints(6), inject=True), "start of a prefill"),
}


@pytest.mark.parametrize("name", WRONG_AFTER_STEP)
def test_refuses_after_a_step(name: str) -> None:
    call, what = WRONG_AFTER_STEP[name]
    with pytest.raises(BackendError, match=f"the backend protocol is broken: {what}"):
        call(stepped())


def plain_steps(backend: ScriptedBackend, count: int) -> None:
    """Plain steps from the end of the prompt 10, 11, 12 on, none of which injects."""
    for start in range(3, 3 + count):
        backend.step(ints(start + 10), ints(start), verify_len=1, inject=None)


def test_features_of_plain_steps_are_injected_later() -> None:
    backend = prefilled()
    plain_steps(backend, 3)
    with pytest.raises(BackendError, match=r"rows without the features of their token\n.*\[3, 4, 5\]"):
        backend.step(ints(16), ints(6), verify_len=4, inject=None)
    backend = prefilled()
    plain_steps(backend, 3)
    backend.step(ints(16), ints(6), verify_len=1, inject=Inject(ints(3), 3))  # a plain step may inject, too
    backend.step(ints(17), ints(7), verify_len=4, inject=Inject(ints(6), 1))


def test_features_are_kept_for_a_while() -> None:
    for count, kept in ((5, True), (6, False)):
        backend = ScriptedBackend(plus_one, block_size=4, prefill_chunk=5)
        backend.reserve(20)
        backend.prefill(ints(10, 11, 12)[None], ints(0), inject=True)
        plain_steps(backend, count)
        end = 3 + count
        with contextlib.nullcontext() if kept else pytest.raises(BackendError, match="not kept"):
            backend.step(ints(10 + end), ints(end), verify_len=4, inject=Inject(ints(3), count))


def test_drafting_needs_features_of_the_prompt() -> None:
    backend = ScriptedBackend(plus_one, block_size=4)
    backend.reserve(20)
    backend.prefill(ints(10, 11)[None], ints(0), inject=False)
    with pytest.raises(BackendError, match=r"rows without the features of their token\n.*\[0, 1\]"):
        backend.step(ints(12), ints(2), verify_len=2, inject=None)


def test_features_of_an_older_sequence_count_for_nothing() -> None:
    backend = ScriptedBackend(plus_one, wrong_from_third, block_size=4)
    backend.reserve(20)
    backend.prefill(ints(*range(10, 20))[None], ints(0), inject=True)
    backend.prefill(ints(10, 11, 12)[None], ints(0), inject=True)
    backend.step(ints(13), ints(3), verify_len=4, inject=None)  # writes its block over the old rows 13 to 16
    with pytest.raises(BackendError, match=r"rows without the features of their token\n.*\[3, 4, 5\]"):
        backend.step(ints(16), ints(6), verify_len=4, inject=None)
    backend.clear()
    backend.prefill(ints(10, 11, 12)[None], ints(0), inject=False)
    with pytest.raises(BackendError, match=r"rows without the features of their token\n.*\[0, 1, 2\]"):
        backend.step(ints(13), ints(3), verify_len=4, inject=None)


def test_step_needs_room() -> None:
    backend = ScriptedBackend(plus_one, block_size=2)
    backend.reserve(1)
    backend.prefill(ints(1)[None], ints(0), inject=True)
    backend.step(ints(2), ints(1), verify_len=2, inject=None)
    with pytest.raises(BackendError, match=r"rows reserved\n  found: 1\n  expected: 3"):
        backend.step(ints(4), ints(3), verify_len=2, inject=Inject(ints(1), 2))


def test_step_needs_a_prefill() -> None:
    backend = ScriptedBackend(plus_one)
    with pytest.raises(BackendError, match="a prefill first"):
        backend.step(ints(1), ints(0), verify_len=1, inject=None)


def test_wrong_number_of_drafts() -> None:
    backend = ScriptedBackend(plus_one, lambda prefix, count: [0], block_size=4)
    backend.reserve(9)
    backend.prefill(ints(1)[None], ints(0), inject=True)
    with pytest.raises(BackendError, match="tokens from the drafter function"):
        backend.step(ints(2), ints(1), verify_len=4, inject=None)


def test_raises_when_told_and_wants_a_clear() -> None:
    error = NumericalError("logits are not finite")
    backend = prefilled(raise_at={1: error})
    with pytest.raises(NumericalError) as caught:
        backend.step(ints(13), ints(3), verify_len=4, inject=None)
    assert caught.value is error
    with pytest.raises(BackendError, match="clear first"):
        backend.reserve(1)
    backend.clear()
    with pytest.raises(BackendError, match="a prefill first"):  # a clear forgets the sequence
        backend.step(ints(13), ints(3), verify_len=4, inject=None)
    backend.clear()
    backend.prefill(ints(10, 11, 12)[None], ints(0), inject=True)
    backend.step(ints(13), ints(3), verify_len=4, inject=None)


def test_nothing_after_close() -> None:
    backend = prefilled()
    backend.close()
    backend.close()
    assert backend.closed
    for call in (
        backend.clear,
        lambda: backend.reserve(1),
        lambda: backend.prefill(ints(1)[None], ints(0), inject=True),
    ):
        with pytest.raises(BackendError, match="the backend is closed"):
            call()


def test_refuses_two_threads_at_once() -> None:
    inside, leave = threading.Event(), threading.Event()

    def slow(prefix: tuple[int, ...]) -> int:
        inside.set()
        assert leave.wait(10)
        return 0

    backend = ScriptedBackend(slow)
    backend.reserve(1)
    thread = threading.Thread(target=lambda: backend.prefill(ints(1)[None], ints(0), inject=True))
    thread.start()
    assert inside.wait(10)
    with pytest.raises(BackendError, match="another call is running"):
        backend.reserve(2)
    leave.set()
    thread.join(10)


def test_time_inside_is_counted() -> None:
    backend = prefilled()
    before = backend.run_seconds["step"]
    backend.step(ints(13), ints(3), verify_len=4, inject=None)
    assert backend.run_seconds["step"] > before > 0.0
