"""A running request: an iterator of chunks, with its result at the end."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, TypeAlias

from dflash_rt.backends.base import Backend
from dflash_rt.decoding.loop import Decoded, decode
from dflash_rt.decoding.policy import WidthPolicy
from dflash_rt.decoding.sequence import Sequence
from dflash_rt.errors import GeneratorStateError
from dflash_rt.request import Request
from dflash_rt.request_lock import RequestLock
from dflash_rt.sampling.params import TokenLogprob
from dflash_rt.sampling.sampler import Sampler
from dflash_rt.stats import GenerationStats
from dflash_rt.text.stop_strings import TextAssembler

__all__ = ["Chunk", "FinishReason", "GenerationResult", "TokenStream"]

FinishReason: TypeAlias = Literal["stop", "length", "cancelled"]
"""A stop token or stop string; ``max_new_tokens`` or the context limit; the caller closed the stream."""


@dataclass(frozen=True)
class Chunk:
    """What one step added.

    Attributes:
        text: new text; empty while a character or a possible stop string is incomplete.
        token_ids: new tokens, at least one.
        drafted: how many of ``token_ids``, counted from the first, the drafter proposed.
        finish_reason: set on the last chunk only.
        logprobs: one for each of ``token_ids``, if the request asked for them.
    """

    text: str
    token_ids: tuple[int, ...]
    drafted: int
    finish_reason: Literal["stop", "length"] | None
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True)
class GenerationResult:
    """The text and token ids of all chunks, and statistics. A cancelled request has those yielded so far.

    ``token_ids`` includes the stop token, or the token that completed a stop string; ``text`` ends before
    the stop string, and special tokens give no text. ``logprobs`` has one item for each token, if the request
    asked for them. ``seed`` is the one used, given or drawn; ``None`` at temperature 0.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stats: GenerationStats
    logprobs: tuple[TokenLogprob, ...] | None = None
    seed: int | None = None


class TokenStream(Iterator[Chunk]):
    """The chunks of one request, one per step. Each ``next()`` runs one step.

    The first ``next()`` waits for other threads' requests and then occupies the generator. The last chunk, an
    error or :meth:`close` frees it, and so does dropping the stream, as when a ``for`` loop is left. After
    the end :attr:`result` is available, unless an error ended it. Any thread may close a stream, also while
    it waits.
    """

    def __init__(
        self,
        backend: Backend,
        request: Request,
        text: TextAssembler,
        *,
        prefill_chunk: int,
        lock: RequestLock,
        widths: WidthPolicy,
    ) -> None:
        self._state: Literal["new", "waiting", "running", "ended"] = "new"
        self._backend = backend
        self._request = request
        self._assembler = text
        self._lock = lock
        self._sequence = Sequence(request.prompt)
        sampling = request.sampling
        self._sampler = Sampler(sampling, request.prompt) if sampling.needs_logits else None
        self._emitted = 0  # tokens in chunks so far
        self._loop = decode(
            backend,
            self._sequence,
            max_new_tokens=request.max_new_tokens,
            verify_len=widths,
            prefill_chunk=prefill_chunk,
            stop_token_ids=request.stop_token_ids,
            sampler=self._sampler,
        )
        self._chunks: list[Chunk] = []
        self._prefill_seconds = self._decode_seconds = 0.0
        self._seconds_before: dict[str, float] | None = None  # the backend's clocks when the first step began
        self._result: GenerationResult | None = None
        self._mutex = threading.RLock()
        self._inside = False  # a step is running; only a call from inside it (a signal handler) reads True
        self._cancelled = False  # close() was called: the running step will end the stream

    def __next__(self) -> Chunk:
        """The next step's chunk.

        Raises:
            StopIteration: the request has ended.
            GeneratorStateError: the generator is closed, or this thread has another open stream on it.
            BackendError: the backend failed; the stream has ended, and the generator can be used again.
        """
        self._acquire()
        with self._mutex:
            if self._inside:
                raise _misused("next() was called from inside the stream's own step")
            if self._state != "running":
                raise StopIteration
            self._lock.advance()
            self._inside = True
            try:
                chunk = self._advance()
            except BaseException:
                self._end(None)
                raise
            finally:
                self._inside = False
            if chunk.finish_reason is not None:
                self._end(chunk.finish_reason)
            elif self._cancelled:
                self._end("cancelled")
            return chunk

    @property
    def result(self) -> GenerationResult:
        """The whole result. Raises GeneratorStateError before the end, and after an error."""
        if self._result is None:
            raise GeneratorStateError(
                "the stream has no result",
                found="it ended with an error" if self._state == "ended" else "it hasn't ended",
                expected="a stream that was read to its end, or closed",
                remedy="read it to its end or close it; after an error, start a new one",
            )
        return self._result

    def close(self) -> None:
        """End the request; its finish reason is ``"cancelled"`` unless it had ended. Safe to call twice.

        Waits for the step of another thread that is inside ``next()``.
        """
        self._cancelled = True  # before the mutex, which a busy reader may take again and again
        with self._mutex:
            if not self._inside:
                self._end("cancelled")

    def __enter__(self) -> TokenStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # No caller can ask for the result any more, but other requests wait for the lock.
        if self._state == "running":
            self._state = "ended"
            self._lock.release()

    def _acquire(self) -> None:
        with self._mutex:
            if self._state == "waiting":
                raise _misused("another thread is starting this stream")
            if self._state != "new":
                return
            self._state = "waiting"
        acquired = False
        try:
            self._lock.take(self)  # without the mutex, so that close() works while this waits
            acquired = True
        finally:
            self._end_waiting(acquired)

    def _end_waiting(self, acquired: bool) -> None:
        with self._mutex:
            if self._state == "waiting":
                self._state = "running" if acquired else "new"
            elif acquired:  # closed while it waited
                self._lock.release()

    def _advance(self) -> Chunk:
        began = time.perf_counter()
        decoded = next(self._loop)
        chunk = self._assemble(decoded)
        self._chunks.append(chunk)
        seconds = time.perf_counter() - began
        if self._seconds_before is None:
            self._prefill_seconds = seconds
            self._seconds_before = dict(self._backend.run_seconds)
        else:
            self._decode_seconds += seconds
        return chunk

    def _assemble(self, decoded: Decoded) -> Chunk:
        text, token_ids, stopped = self._assembler.push(decoded.token_ids)
        if not stopped and decoded.finish_reason is not None:
            held = self._assembler.flush()
            text, stopped = text + held.text, held.stopped
        reason = "stop" if stopped else decoded.finish_reason
        begin, self._emitted = self._emitted, self._emitted + len(token_ids)
        logprobs = None
        if self._sampler is not None and self._request.sampling.logprobs is not None:
            # The sampler may have chosen tokens behind a stop, which aren't emitted.
            logprobs = tuple(self._sampler.logprobs[begin : self._emitted])
        return Chunk(text, token_ids, min(decoded.drafted, len(token_ids)), reason, logprobs)

    def _end(self, reason: FinishReason | None) -> None:
        """Leave the loop and release the lock. Without a reason there is no result."""
        if self._state == "ended":
            return
        running, self._state = self._state == "running", "ended"
        try:
            self._loop.close()
            if reason is not None:
                self._result = self._make_result(reason)
        finally:
            if running:
                self._lock.release()

    def _make_result(self, reason: FinishReason) -> GenerationResult:
        token_ids = tuple(token for chunk in self._chunks for token in chunk.token_ids)
        before = self._seconds_before
        stats = GenerationStats(
            prompt_tokens=self._sequence.prompt_rows,
            new_tokens=len(token_ids),
            num_draft_tokens=self._request.num_draft_tokens,
            accepted_per_step=tuple(self._sequence.accepted_per_step),
            drafted_per_step=tuple(rows - 1 for rows in self._sequence.verify_len_per_step),
            prefill_seconds=self._prefill_seconds,
            decode_seconds=self._decode_seconds,
            stage_seconds={}
            if before is None
            else {
                stage: total - before.get(stage, 0.0) for stage, total in self._backend.run_seconds.items()
            },
        )
        sampling = self._request.sampling
        return GenerationResult(
            "".join(chunk.text for chunk in self._chunks),
            token_ids,
            reason,
            stats,
            None
            if sampling.logprobs is None
            else tuple(item for chunk in self._chunks for item in chunk.logprobs or ()),
            None if sampling.temperature == 0 else sampling.seed,
        )


def _misused(found: str) -> GeneratorStateError:
    return GeneratorStateError(
        "a stream was used twice at once",
        found=found,
        expected="one next() at a time",
        remedy="read a stream from one place; close() may be called from anywhere",
    )
