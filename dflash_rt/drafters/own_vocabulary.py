"""Kind ``speculators``: a block, with an embedding and a head of the drafter's own."""

from __future__ import annotations

from typing import ClassVar

from dflash_rt.drafters.base import FLOAT_DTYPES, Drafter, Link, Sizes, Tensors

__all__ = ["OwnVocabularyDrafter"]


class OwnVocabularyDrafter(Drafter):
    """See the top of the file. Its head may know fewer tokens, and gives the target's ids of the best."""

    kind: ClassVar[str] = "speculators"
    required_graphs: ClassVar[tuple[str, ...]] = ("draft_embed", "draft_lm_head")
    embed: ClassVar[str] = "draft_embed"
    head: ClassVar[str] = "draft_lm_head"
    links: ClassVar[tuple[Link, ...]] = (
        ("draft_embed", "embeddings", "draft", "embeddings"),
        ("draft", "hidden", "draft_lm_head", "hidden"),
    )
    has_own_vocabulary: ClassVar[bool] = True

    @classmethod
    def tensors(cls, sizes: Sizes) -> dict[str, tuple[Tensors, Tensors]]:
        ids = ("int64",), ("batch", "rows")
        row = FLOAT_DTYPES, ("batch", "rows", sizes.hidden)
        logits = ("float32",), ("batch", "rows", sizes.own_vocab)
        return {
            "draft_embed": ({"input_ids": ids}, {"embeddings": row}),
            "draft_lm_head": ({"hidden": row}, {"logits": logits, "token_ids": ids}),
        }
