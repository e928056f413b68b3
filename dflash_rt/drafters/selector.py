"""Kind ``dflash-v2``: a block whose tokens are chosen one by one among the best candidates of each row."""

from __future__ import annotations

from typing import ClassVar

from dflash_rt.drafters.base import FLOAT_DTYPES, GraphRun, Link, Operation, Sizes, Tensors
from dflash_rt.drafters.block import BlockDrafter

__all__ = ["SelectorDrafter"]


class SelectorDrafter(BlockDrafter):
    """See the top of the file; ``select`` walks through the candidates."""

    kind: ClassVar[str] = "dflash-v2"
    required_graphs: ClassVar[tuple[str, ...]] = ("select",)
    links: ClassVar[tuple[Link, ...]] = (*BlockDrafter.links, ("draft", "hidden", "select", "hidden"))
    samples: ClassVar[bool] = True

    @classmethod
    def tensors(cls, sizes: Sizes) -> dict[str, tuple[Tensors, Tensors]]:
        per_candidate = "batch", "rows", sizes.candidates
        inputs: Tensors = {
            "hidden": (FLOAT_DTYPES, ("batch", "rows", sizes.hidden)),
            "logits": (("float32",), ("batch", "rows", sizes.vocab)),
            "anchors": (("int64",), ("batch",)),
            "temperature": (("float32",), ("batch",)),
            "uniforms": (("float32",), ("batch", "rows")),
        }
        outputs: Tensors = {
            "token_ids": (("int64",), ("batch", "rows")),
            "candidates": (("int64",), per_candidate),
            "probabilities": (("float32",), per_candidate),
        }
        return {**super().tensors(sizes), "select": (inputs, outputs)}

    def step(self, num_draft_tokens: int) -> tuple[Operation, ...]:
        hidden, logits, operations = self._best(num_draft_tokens)
        names = (("hidden", hidden), ("logits", logits), ("token_ids", "drafted"))
        return (*operations, GraphRun("select", num_draft_tokens, "draft_head", names))
