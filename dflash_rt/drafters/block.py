"""Kind ``dflash-v1``: a block of masks in one pass, and the target's own head; the best token of each row."""

from __future__ import annotations

from typing import ClassVar

from dflash_rt.drafters.base import Drafter, Link, Sizes, Tensors

__all__ = ["BlockDrafter"]


class BlockDrafter(Drafter):
    """See the top of the file. ``draft_logits`` is there if it changes the logits after the head."""

    kind: ClassVar[str] = "dflash-v1"
    optional_graphs: ClassVar[tuple[str, ...]] = ("draft_logits",)
    links: ClassVar[tuple[Link, ...]] = (("lm_head", "logits", "draft_logits", "logits"),)

    @classmethod
    def tensors(cls, sizes: Sizes) -> dict[str, tuple[Tensors, Tensors]]:
        logits = ("float32",), ("batch", "rows", sizes.vocab)
        token_ids = ("int64",), ("batch", "rows")
        return {"draft_logits": ({"logits": logits}, {"logits.out": logits, "token_ids": token_ids})}
