"""Kind ``speculators``: a block, with an embedding and a head of the drafter's own."""

from __future__ import annotations

from typing import ClassVar

from dflash_rt.drafters.base import (
    FLOAT_DTYPES,
    CheckFinite,
    Drafter,
    GraphRun,
    Link,
    Operation,
    Sizes,
    Tensors,
)

__all__ = ["OwnVocabularyDrafter"]


class OwnVocabularyDrafter(Drafter):
    """See the top of the file. Its head may know fewer tokens, and gives the target's ids of the best."""

    kind: ClassVar[str] = "speculators"
    required_graphs: ClassVar[tuple[str, ...]] = ("draft_embed", "draft_lm_head")
    links: ClassVar[tuple[Link, ...]] = (
        ("draft_embed", "embeddings", "draft", "embeddings"),
        ("draft", "hidden", "draft_lm_head", "hidden"),
    )
    has_own_vocabulary: ClassVar[bool] = True

    @classmethod
    def tensors(cls, sizes: Sizes) -> dict[str, tuple[Tensors, Tensors]]:
        """``draft_embed`` and ``draft_lm_head``; see :meth:`Drafter.tensors`."""
        ids = ("int64",), ("batch", "rows")
        row = FLOAT_DTYPES, ("batch", "rows", sizes.hidden)
        logits = ("float32",), ("batch", "rows", sizes.own_vocab)
        return {
            "draft_embed": ({"input_ids": ids}, {"embeddings": row}),
            "draft_lm_head": ({"hidden": row}, {"logits": logits, "token_ids": ids}),
        }

    def step(self, num_draft_tokens: int) -> tuple[Operation, ...]:
        """See :meth:`Drafter.step`."""
        hidden, block = self._hidden_rows(num_draft_tokens, "draft_embed")
        names = (("hidden", hidden), ("logits", "draft_logits"), ("token_ids", "drafted"))
        return (
            *block,
            GraphRun("draft_lm_head", num_draft_tokens, "draft_head", names),
            CheckFinite("draft_logits", num_draft_tokens),
        )
