"""Drafted decoding by the loop of PyPI ``dflash``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dflash_bench.systems.base import BenchSetup, Outcome, System
from dflash_bench.systems.checkpoints import (
    checkpoint,
    missing,
    needs_torch,
    require_fp32,
    target_model,
    torch_threads,
)

__all__ = ["ReferenceLoop", "make_reference"]


def make_reference(setup: BenchSetup) -> Sequence[System]:
    """The loop of PyPI ``dflash``, once for each number of draft tokens.

    Raises:
        BackendUnavailableError: a package is missing, or the bundle isn't fp32.
        DFlashError: as in :func:`~dflash_bench.systems.huggingface.make_hf`, for target and drafter.
    """
    require_fp32(setup, "reference")
    with needs_torch("reference"):
        from dflash_export.reference import load_drafter, reference_version
    if reference_version() is None:
        raise missing("reference", "dflash", "pip install --no-deps dflash==0.1.0")
    target = target_model(setup, "reference")
    drafter = load_drafter(checkpoint(setup, "drafter"))
    return [
        ReferenceLoop(drafter, target, count, setup.stop_token_ids, setup.threads)
        for count in setup.num_draft_tokens
    ]


class ReferenceLoop:
    """The reference's own loop and its own clock, which stands between prefill and decoding.

    It clips its last blocks to the tokens still wanted, so that the last of its steps are narrower than
    others'. That can only make it look faster.
    """

    def __init__(
        self,
        drafter: Any,
        target: Any,
        num_draft_tokens: int,
        stop_token_ids: Sequence[int] = (),
        threads: int | None = None,
    ) -> None:
        self.name = f"reference-{num_draft_tokens}"
        self.num_draft_tokens: int | None = num_draft_tokens
        self._block_size = num_draft_tokens + 1
        self._models = (drafter, target)
        self._stops = stop_token_ids
        self._threads = threads

    def decode(self, prompt: Sequence[int], max_new_tokens: int, /) -> Outcome:
        """See :class:`~dflash_bench.systems.base.System`."""
        from dflash_export.reference import generate_reference

        with torch_threads(self._threads):
            run = generate_reference(
                *self._models,
                prompt,
                max_new_tokens=max_new_tokens,
                stop_token_ids=self._stops,
                block_size=self._block_size,
            )
        return Outcome(run.token_ids, run.prefill_seconds, run.decode_seconds, len(run.tokens_by_step))

    def close(self) -> None:
        """Let go of the models."""
        self._models = (None, None)
