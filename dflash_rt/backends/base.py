"""The protocol between the decoding loop and whatever runs the graphs.

A backend owns buffers and nothing else: which tokens a sequence has, where it stands and what
has been accepted belongs to :class:`dflash_rt.decoding.sequence.Sequence`. Every array has the batch axis
first, one row per slot, so that several sequences can share a call later: a slot that takes no
part writes at its own ``start``, and those rows are overwritten before anything reads them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, cast

from dflash_rt.arrays import FloatArray, IntArray
from dflash_rt.sampling.proposal import DraftSampling, Proposal

__all__ = [
    "AheadBackend",
    "Backend",
    "Inject",
    "StepOutput",
    "as_ahead",
]


@dataclass(frozen=True)
class Inject:
    """Feature rows that the drafter's cache doesn't hold yet.

    ``start`` is int64 ``[batch]``, where these rows begin; ``rows`` is how many there are, up to the end of
    the last verify pass. After a drafted step these are the rows of its pass; after plain steps, in which
    nothing was injected, there are more. Rejected rows are injected too: nothing reads them before a later
    pass overwrites them.
    """

    start: IntArray
    rows: int


@dataclass(frozen=True)
class StepOutput:
    """Tokens of one step. Both arrays are the caller's to keep.

    ``drafted`` is int64 ``[batch, width - 1]``: what the drafter proposes after the anchor.
    ``verified`` is int64 ``[batch, width]``: the target's own choice after each row of the block, so
    ``verified[:, j]`` is compared with ``drafted[:, j]`` and the first one that differs is the bonus.
    ``proposal`` says what the drafts were sampled from, and is ``None`` where they weren't.
    """

    drafted: IntArray
    verified: IntArray
    proposal: Proposal | None = None


class Backend(Protocol):
    """Runs the graphs of one bundle over buffers that are allocated once.

    Not thread-safe: the generator queues its calls.
    """

    @property
    def name(self) -> str:
        """Registry name, such as ``"onnxruntime"``."""

    @property
    def run_seconds(self) -> dict[str, float]:
        """Seconds spent inside the vendor's ``run`` so far, by stage.

        Stages: ``inject``, ``draft``, ``draft_head``, ``embed``, ``target``, ``target_head``. A backend that
        runs a whole step at once reports one stage, ``step``. Cumulative over the backend's life.
        """

    def reserve(self, rows: int) -> None:
        """Make room for ``rows`` committed rows per slot, plus one whole block.

        May allocate and copy what is cached; called between steps, never inside one.
        """

    def prefill(self, token_ids: IntArray, start: IntArray, *, inject: bool) -> IntArray:
        """Feed ``token_ids`` ``[batch, rows]`` to the target at ``start`` ``[batch]``.

        With ``inject`` the rows' features also go into the drafter's cache. Returns int64 ``[batch]``: the
        target's choice after the last row. Raises :class:`~dflash_rt.errors.NumericalError`.
        """

    def step(
        self,
        anchors: IntArray,
        start: IntArray,
        *,
        width: int,
        inject: Inject | None,
        sampling: DraftSampling | None = None,
    ) -> StepOutput:
        """Draft ``width - 1`` tokens after ``anchors`` ``[batch]`` and verify them in one target pass.

        ``start`` ``[batch]`` is where the anchors go. ``inject`` names features of earlier verify passes
        that are to be injected first; ``None`` leaves the drafter's cache as it is. ``width == 1`` is plain
        decoding: no draft. ``sampling`` is for a drafter that can sample what it proposes, which it then
        tells in ``proposal``; without it every drafter proposes what it thinks best. Raises
        :class:`~dflash_rt.errors.NumericalError` when logits are not finite.

        A step keeps the features of its rows by position, those of the last ``max(prefill_chunk,
        block_size)`` positions at least, so that a later step can inject them.
        """

    def logits(self) -> FloatArray:
        """The target's logits of the last call, float32 ``[batch, rows, vocab]``, not to be changed.

        After a step: ``width`` rows, those of ``verified``. After a prefill: one row. A view of the backend's
        own memory or a copy, valid until the next prefill or step. Greedy requests never ask, so a backend
        that keeps logits on a device copies them here and nowhere else.
        """

    def clear(self) -> None:
        """Zero every cache. Needed after a failed step: masked rows still multiply, and 0 x NaN is NaN."""

    def close(self) -> None:
        """Free everything. Safe to call twice."""


class AheadBackend(Backend, Protocol):
    """A backend that can begin a greedy step before the host has read the one before it.

    Every step that was launched is read by :meth:`collect`, in order. Those that nobody reads any more are
    forgotten by the next prefill, the next :meth:`step`, :meth:`clear` and :meth:`close`.
    """

    @property
    def runs_ahead(self) -> bool:
        """Whether to use :meth:`launch` and :meth:`collect`."""

    def launch(self, width: int, anchors: IntArray | None = None, start: IntArray | None = None) -> None:
        """Begin a greedy step of ``width`` rows: at ``anchors`` and ``start``, or where the last one ends.

        The caller sees to it that there is room, however many drafts of the last step are accepted.
        """

    def collect(self) -> StepOutput:
        """Wait for the oldest step that was launched. Raises NumericalError as :meth:`step` does."""


def as_ahead(backend: Backend) -> AheadBackend | None:
    """``backend``, if it can run ahead and is to."""
    return cast(AheadBackend, backend) if getattr(backend, "runs_ahead", False) else None
