"""The protocol between the decoding loop and whatever runs the graphs.

A backend owns buffers and nothing else: which tokens a sequence has, where it stands and what
has been accepted belongs to :class:`dflash_rt.decoding.sequence.Sequence`. Every array has the batch axis
first, one row per slot, so that several sequences can share a call later: a slot that takes no
part writes at its own ``start``, and those rows are overwritten before anything reads them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

from dflash_rt.arrays import FloatArray, IntArray
from dflash_rt.errors import BackendError
from dflash_rt.sampling.proposal import DraftSampling, Proposal

__all__ = [
    "Backend",
    "Inject",
    "StepOutput",
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

    ``drafted`` is int64 ``[batch, verify_len - 1]``: what the drafter proposes after the anchor.
    ``verified`` is int64 ``[batch, verify_len]``: the target's own choice after each row of the block, so
    ``verified[:, j]`` is compared with ``drafted[:, j]`` and the first one that differs is the bonus.
    ``proposal`` says what the drafts were sampled from, and is ``None`` where they weren't.
    """

    drafted: IntArray
    verified: IntArray
    proposal: Proposal | None = None


class Backend(ABC):
    """Runs the graphs of one bundle over buffers that are allocated once.

    A subclass must define every abstract member; the rest has defaults. Not thread-safe: the generator
    queues its calls. Any method may raise :class:`~dflash_rt.errors.BackendError`.

    Attributes:
        name: registry name, such as ``"onnxruntime"``.
        max_seq_len: prompt and output tokens together at most; ``None``: what the bundle allows.
        runs_ahead: whether the loop may use :meth:`launch` and :meth:`collect`.
    """

    name: str
    max_seq_len: int | None = None
    runs_ahead: bool = False

    @property
    @abstractmethod
    def run_seconds(self) -> dict[str, float]:
        """Seconds spent inside the vendor's ``run`` so far, by stage.

        Stages: ``inject``, ``draft``, ``draft_head``, ``embed``, ``target``, ``target_head``. A backend that
        runs a whole step at once reports one stage, ``step``. Cumulative over the backend's life.
        """

    def warm_up(self, verify_lens: Iterable[int]) -> None:  # noqa: B027  # the default has nothing to do
        """Do now what is done once for prefills and for steps of these verify lengths.

        Otherwise the first passes of each kind do it. Called between requests; all caches are cleared.
        """

    def share_weights(self) -> Backend | None:
        """Another backend on the same weights, with buffers and caches of its own; ``None``: it can't.

        Each is closed by itself, and two of them may be in the middle of a sequence at once.
        """
        return None

    @abstractmethod
    def reserve(self, rows: int) -> None:
        """Make room for ``rows`` committed rows per slot, plus one whole block.

        May allocate and copy what is cached; called between steps, never inside one.
        """

    @abstractmethod
    def prefill(self, token_ids: IntArray, start: IntArray, *, inject: bool) -> IntArray:
        """Feed ``token_ids`` ``[batch, rows]`` to the target at ``start`` ``[batch]``.

        A slot whose ``start`` is 0 begins a new sequence, whatever it held before. With ``inject`` the rows'
        features also go into the drafter's cache. Returns int64 ``[batch]``: the target's choice after the
        last row. Raises :class:`~dflash_rt.errors.NumericalError`.
        """

    @abstractmethod
    def step(
        self,
        anchors: IntArray,
        start: IntArray,
        *,
        verify_len: int,
        inject: Inject | None,
        sampling: DraftSampling | None = None,
    ) -> StepOutput:
        """Draft ``verify_len - 1`` tokens after ``anchors`` ``[batch]`` and verify them in one target pass.

        ``start`` ``[batch]`` is where the anchors go, wherever the last step ended. ``inject`` names features
        of earlier verify passes that are to be injected first; ``None`` leaves the drafter's cache as it is.
        ``verify_len == 1`` is plain decoding: no draft. ``sampling`` is for a drafter that can sample what it
        proposes, which it then tells in ``proposal``; without it every drafter proposes what it thinks best.
        Raises :class:`~dflash_rt.errors.NumericalError` when logits are not finite.

        A step keeps the features of its rows by position, those of the last ``max(prefill_chunk,
        block_size)`` positions at least, so that a later step can inject them.
        """

    @abstractmethod
    def logits(self) -> FloatArray:
        """The target's logits of the last call, float32 ``[batch, rows, vocab]``, not to be changed.

        After a step: ``verify_len`` rows, those of ``verified``. After a prefill: one row. A view of the
        backend's own memory or a copy, valid until the next prefill or step. Greedy requests never ask, so a
        backend that keeps logits on a device copies them here and nowhere else.
        """

    @abstractmethod
    def clear(self) -> None:
        """Zero every cache. Needed after a failed step: masked rows still multiply, and 0 x NaN is NaN."""

    @abstractmethod
    def close(self) -> None:
        """Free everything. Safe to call twice."""

    # --- Running ahead ---

    # A backend that can begin a greedy step before the host has read the one before it says so in
    # `runs_ahead`. Every step that was launched is read by `collect`, in order. Those that nobody reads any
    # more are forgotten by the next prefill, the next `step`, `clear` and `close`.

    def launch(self, verify_len: int, anchors: IntArray | None = None, start: IntArray | None = None) -> None:
        """Begin a greedy step of ``verify_len`` rows.

        With ``anchors`` and ``start`` it restarts there, whatever ran before; without them it goes on where
        the last step ends, which the host may not know yet.

        The caller sees to it that there is room, however many drafts of the last step are accepted.
        """
        raise self._runs_no_step_ahead()

    def collect(self) -> StepOutput:
        """Wait for the oldest step that was launched. Raises NumericalError as :meth:`step` does."""
        raise self._runs_no_step_ahead()

    def _runs_no_step_ahead(self) -> BackendError:
        return BackendError(
            "the backend doesn't run ahead",
            found=f"launch or collect of {self.name}",
            expected="step()",
            remedy="look at runs_ahead first",
        )
