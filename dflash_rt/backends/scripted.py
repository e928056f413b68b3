"""A backend without a model: the target and the drafter are Python functions. For tests.

It keeps two small tables in place of caches, one cell per row, and answers from what the tables really hold:
a wrong ``start``, a missing injection or a forgotten rollback gives wrong tokens here just as it would in a
model. On top of that it refuses every call that breaks the protocol of :mod:`dflash_rt.backends.base`, with
a :class:`~dflash_rt.errors.BackendError` that says how.

    >>> backend = ScriptedBackend(target=lambda prefix: (prefix[-1] + 1) % 10, block_size=4)
    >>> backend = ScriptedBackend(target=follow([5, 6, 7, 8, 9]))  # recites, the prompt included
    >>> backend = ScriptedBackend.with_logits(lambda prefix: [0.0, 1.0, 2.0])  # for sampling
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from dflash_rt.arrays import FloatArray, IntArray
from dflash_rt.backends.base import Backend, Inject, StepOutput
from dflash_rt.errors import BackendError
from dflash_rt.sampling.proposal import DraftSampling

__all__ = ["Drafter", "Logits", "ScriptedBackend", "Target", "follow"]

Target = Callable[[tuple[int, ...]], int]
"""Prefix (every token so far, the prompt included) -> next token."""

Drafter = Callable[[tuple[int, ...], int], Sequence[int]]
"""Prefix that ends with the anchor, and a count n -> n drafted tokens."""

Logits = Callable[[tuple[int, ...]], Sequence[float] | FloatArray]
"""Prefix -> logits of the next token, one for each id of the vocabulary."""

_EMPTY = -1  # nothing was written here since the caches were cleared
_BLOCK = -2  # a draft block wrote here: garbage once the block is verified


def follow(tokens: Sequence[int]) -> Target:
    """A target that recites ``tokens`` (prompt included) by position, and then repeats the last one."""
    script = tuple(tokens)
    return lambda prefix: script[min(len(prefix), len(script) - 1)]


@dataclass(frozen=True)
class _Pass:
    """The last target pass: what it fed in where, and what has to come next."""

    kind: str  # "prefill" | "verify"
    start: int
    tokens: tuple[int, ...]
    next_start: int
    next_anchor: int


class ScriptedBackend(Backend):
    """Plays a target and a drafter, one slot, and checks its caller.

    Args:
        target: decides every token, as a greedy model would.
        drafter: proposes tokens; left out, it is the target itself, so that every draft is accepted.
        block_size: rows of a block at most.
        prefill_chunk: rows of one prefill call at most; ``None`` for no limit.
        max_rows: committed rows that may be reserved at most; ``None`` for no limit.
        raise_at: exceptions by number of the call (prefills and steps count together, from 0, over the
            backend's life). They are raised after the call has written its rows, as a real failure
            would be; the backend then insists on :meth:`clear`.
        logits: what :meth:`logits` answers from; see :meth:`with_logits`.
    """

    name = "scripted"

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None = None,
        *,
        block_size: int = 8,
        prefill_chunk: int | None = None,
        max_rows: int | None = None,
        raise_at: Mapping[int, BaseException] | None = None,
        logits: Logits | None = None,
    ) -> None:
        self._target = target
        self._drafter = drafter if drafter is not None else self._draft_as_target
        self._block_size = block_size
        self._prefill_chunk = prefill_chunk
        self._max_rows = max_rows
        self._raise_at = dict(raise_at or {})
        self._logits = logits
        self._chosen_outside = False  # logits were asked for since the last call
        self._seconds = 0.0
        self._calls = 0
        self._reserved = 0
        self._busy = threading.Lock()
        self._closed = False
        self._failed = False
        self._rows: list[int] = []  # target cache: the token that was fed in at each row
        self._features: list[int] = []  # drafter cache: the token whose features each row holds
        self._kept_rows = max(block_size, prefill_chunk or 2**31)
        self._kept: dict[int, tuple[int, int]] = {}  # features of steps: position and token, by place
        self._last: _Pass | None = None

    @classmethod
    def with_logits(cls, logits: Logits, drafter: Drafter | None = None, **options: Any) -> ScriptedBackend:
        """A target that has a distribution, not a script; its greedy choice is the first largest logit."""
        return cls(
            lambda prefix: int(np.argmax(np.asarray(logits(prefix)))), drafter, logits=logits, **options
        )

    @property
    def run_seconds(self) -> dict[str, float]:
        """One stage, ``step``; prefills count too."""
        return {"step": self._seconds}

    @property
    def calls(self) -> int:
        """Prefills and steps so far."""
        return self._calls

    @property
    def reserved(self) -> int:
        """Committed rows that there is room for; a block fits on top of them."""
        return self._reserved

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed

    def reserve(self, rows: int) -> None:
        with self._entered("reserve"):
            most = self._max_rows
            _expect(most is None or rows <= most, "reserve", rows, f"at most {most}")
            self._reserved = max(self._reserved, rows)

    def prefill(self, token_ids: IntArray, start: IntArray, *, inject: bool) -> IntArray:
        with self._entered("prefill"):
            tokens = _integers("token_ids", token_ids, axes=2)
            first = _integers("start", start, axes=1)[0]
            most = self._prefill_chunk
            _expect(most is None or len(tokens) <= most, "rows of a prefill", len(tokens), f"at most {most}")
            if first != 0:  # at 0 a new sequence begins, whatever came before
                last = self._last
                if last is None or last.kind != "prefill":
                    raise _broken("start of a prefill", first, "0, as no prefill is under way")
                _expect(first == last.next_start, "start of a prefill", first, last.next_start)
            end = first + len(tokens)
            _expect(end <= self._reserved, "rows reserved", self._reserved, end)

            _write(self._rows, first, tokens)
            if inject:
                _write(self._features, first, tokens)
            self._kept.clear()
            self._finish_call()
            choice = self._target(tuple(self._rows[:end]))
            self._chosen_outside = False
            self._last = _Pass("prefill", first, tokens, end, choice)
            return np.array([choice], dtype=np.int64)

    def step(
        self,
        anchors: IntArray,
        start: IntArray,
        *,
        verify_len: int,
        inject: Inject | None,
        sampling: DraftSampling | None = None,
    ) -> StepOutput:
        """See :class:`~dflash_rt.backends.base.Backend`. The drafter is a function: it samples nothing."""
        with self._entered("step"):
            anchor = _integers("anchors", anchors, axes=1)[0]
            first = _integers("start", start, axes=1)[0]
            last = self._last
            if last is None:
                raise _broken("step", "no prefill since the caches were cleared", "a prefill first")
            self._expect_next(first, anchor, last)
            _expect(
                1 <= verify_len <= self._block_size,
                "verify_len of a step",
                verify_len,
                f"1 to {self._block_size}",
            )
            _expect(first <= self._reserved, "rows reserved", self._reserved, first)

            if inject is not None:
                self._inject(inject, last)
            drafted = self._draft(anchor, first, verify_len) if verify_len > 1 else ()
            block = (anchor, *drafted)
            _write(self._rows, first, block)
            for row, token in enumerate(block, start=first):
                self._kept[row % self._kept_rows] = row, token
            self._finish_call()
            verified = [self._target(tuple(self._rows[: first + row + 1])) for row in range(verify_len)]
            accepted = next((i for i, token in enumerate(drafted) if token != verified[i]), verify_len - 1)
            self._last = _Pass("verify", first, block, first + accepted + 1, verified[accepted])
            self._chosen_outside = False
            return StepOutput(np.array([drafted], dtype=np.int64), np.array([verified], dtype=np.int64))

    def logits(self) -> FloatArray:
        """See :class:`~dflash_rt.backends.base.Backend`. From here on the caller may choose other tokens."""
        with self._entered("logits"):
            last = self._last
            if last is None or self._logits is None:
                raise _broken(
                    "logits", "none: no call before, or no logits given", "a prefill or step before"
                )
            end = last.start + len(last.tokens)
            first = end - 1 if last.kind == "prefill" else last.start
            self._chosen_outside = True
            rows = [self._logits(tuple(self._rows[: row + 1])) for row in range(first, end)]
            return np.array([rows], dtype=np.float32)

    def clear(self) -> None:
        with self._entered("clear"):
            self._reset()

    def close(self) -> None:
        if not self._closed:
            with self._entered("close"):
                self._closed = True

    def _reset(self) -> None:
        self._rows.clear()
        self._features.clear()
        self._kept.clear()
        self._last = None
        self._failed = False

    @contextmanager
    def _entered(self, call: str) -> Iterator[None]:
        """Refuse calls after close, after a failure, and from two threads at once; time the others."""
        if not self._busy.acquire(blocking=False):
            raise _broken(call, "another call is running", "one call at a time")
        began = time.perf_counter()
        try:
            if self._closed:
                raise _broken(call, "the backend is closed", "nothing after close")
            if self._failed and call not in ("clear", "close"):
                raise _broken(call, "the call before it failed", "clear first")
            yield
        except BaseException:
            self._failed = True
            raise
        finally:
            if call in ("prefill", "step"):
                self._seconds += time.perf_counter() - began
            self._busy.release()

    def _finish_call(self) -> None:
        number, self._calls = self._calls, self._calls + 1
        if number in self._raise_at:
            raise self._raise_at[number]

    def _expect_next(self, first: int, anchor: int, last: _Pass) -> None:
        if not self._chosen_outside:
            _expect(first == last.next_start, "start of a step", first, last.next_start)
            _expect(anchor == last.next_anchor, "anchor of a step", anchor, last.next_anchor)
            return
        rows = len(last.tokens)
        fed = first - last.start  # rows of the last pass that the caller keeps
        least = rows if last.kind == "prefill" else 1
        _expect(
            least <= fed <= rows, "start of a step", first, f"{last.start + least} to {last.start + rows}"
        )
        if fed < rows:
            draft = last.tokens[fed]
            _expect(anchor != draft, "anchor of a step", anchor, f"not {draft}: that draft was rejected")

    def _inject(self, inject: Inject, last: _Pass) -> None:
        first = _integers("start of inject", inject.start, axes=1)[0]
        if last.kind != "verify":
            raise _broken("inject", "right after a prefill", "None: a prefill injects its own rows")
        _expect(
            first <= last.start, "start of inject", first, f"at most {last.start}, of the last verify pass"
        )
        end = last.start + len(last.tokens)
        _expect(first + inject.rows == end, "rows of inject", inject.rows, f"all {end - first} up to {end}")
        kept = [self._kept.get(row % self._kept_rows, (_EMPTY, _EMPTY)) for row in range(first, end)]
        lost = [row for row, (position, _) in enumerate(kept, start=first) if row != position]
        if lost:
            raise _broken("inject", f"rows {lost}, which are not kept", "rows that steps fed in of late")
        _write(self._features, first, [token for _, token in kept])

    def _draft(self, anchor: int, first: int, verify_len: int) -> tuple[int, ...]:
        committed = self._rows[:first]
        features = (self._features + [_EMPTY] * first)[:first]
        stale = [row for row in range(first) if features[row] != committed[row]]
        if stale:
            raise _broken(
                "rows without the features of their token", stale, "none: inject the last verify pass"
            )
        _write(self._features, first, (_BLOCK,) * verify_len)
        drafted = tuple(int(token) for token in self._drafter((*committed, anchor), verify_len - 1))
        _expect(
            len(drafted) == verify_len - 1, "tokens from the drafter function", len(drafted), verify_len - 1
        )
        return drafted

    def _draft_as_target(self, prefix: tuple[int, ...], count: int) -> Sequence[int]:
        for _ in range(count):
            prefix = (*prefix, self._target(prefix))
        return prefix[len(prefix) - count :]


def _write(table: list[int], start: int, values: Sequence[int]) -> None:
    table.extend([_EMPTY] * (start + len(values) - len(table)))
    table[start : start + len(values)] = values


def _integers(what: str, array: object, *, axes: int) -> tuple[int, ...]:
    """The values of slot 0; refuse what isn't int64 ``[1]`` (one axis) or ``[1, rows]`` (two axes)."""
    expected = "int64 [1]" if axes == 1 else "int64 [1, rows]"
    if not isinstance(array, np.ndarray):
        raise _broken(what, type(array), expected)
    good = array.dtype == np.int64 and array.ndim == axes and array.shape[0] == 1 and array.size > 0
    _expect(good, what, f"{array.dtype} {array.shape}", expected)
    return tuple(int(value) for value in array.ravel())


def _expect(true: bool, what: str, found: object, expected: object) -> None:
    if not true:
        raise _broken(what, found, expected)


def _broken(what: str, found: object, expected: object) -> BackendError:
    return BackendError(
        f"the backend protocol is broken: {what}",
        found=found,
        expected=expected,
        remedy="see dflash_rt.backends.base for the order of calls",
    )
