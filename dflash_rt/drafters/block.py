"""Kind ``dflash-v1``: a block of masks in one pass, and the target's own head; the best token of each row."""

from __future__ import annotations

from typing import ClassVar

from dflash_rt.drafters.base import CheckFinite, Drafter, GraphRun, Link, Operation, Sizes, Tensors

__all__ = ["BlockDrafter"]


class BlockDrafter(Drafter):
    """See the top of the file. ``draft_logits`` is there if it changes the logits after the head."""

    kind: ClassVar[str] = "dflash-v1"
    optional_graphs: ClassVar[tuple[str, ...]] = ("draft_logits",)
    links: ClassVar[tuple[Link, ...]] = (("lm_head", "logits", "draft_logits", "logits"),)

    @classmethod
    def tensors(cls, sizes: Sizes) -> dict[str, tuple[Tensors, Tensors]]:
        """``draft_logits``; see :meth:`Drafter.tensors`."""
        logits = ("float32",), ("batch", "rows", sizes.vocab)
        token_ids = ("int64",), ("batch", "rows")
        return {"draft_logits": ({"logits": logits}, {"logits.out": logits, "token_ids": token_ids})}

    def step(self, num_draft_tokens: int) -> tuple[Operation, ...]:
        """See :meth:`Drafter.step`."""
        _, _, operations = self._best(num_draft_tokens)
        return operations

    def _best(self, num_draft_tokens: int) -> tuple[str, str, tuple[Operation, ...]]:
        """Buffers of the hidden rows and of their logits, and the operations up to the best tokens."""
        hidden, block = self._hidden_rows(num_draft_tokens, "embed")
        logits, drafted = "draft_logits", ("token_ids", "drafted")
        head = (("hidden", hidden), ("logits", logits), drafted)
        operations = (*block, GraphRun("lm_head", num_draft_tokens, "draft_head", head))
        if "draft_logits" in self._graphs:
            names = (("logits", logits), ("logits.out", "draft_logits.out"), drafted)
            operations += (GraphRun("draft_logits", num_draft_tokens, "draft_head", names),)
            logits = "draft_logits.out"
        return hidden, logits, (*operations, CheckFinite(logits, num_draft_tokens))
