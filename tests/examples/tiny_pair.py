"""A tiny target whose answers are easy to learn: a chain of tokens, bent a little by what was said before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from examples.train_drafter.target import Target, freeze
from tests.checkpoints import byte_tokenizer
from tests.pairs import TargetSpec, make_target

CHAIN = 24  # tokens of the chain; ids 0 to CHAIN - 1
MASK = 299
SPEC = TargetSpec("qwen3", tied=False, hidden=32, vocab=300, positions=256)
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def make_chain_target(folder: Path) -> Any:
    """Token t is followed by chain token t % CHAIN + 1, wherever the random layers don't say otherwise."""
    model = make_target(folder, SPEC, spread=0.12)
    draw = torch.Generator().manual_seed(5)
    chain = torch.randn(CHAIN, SPEC.hidden, generator=draw)
    ids = torch.arange(SPEC.vocab)
    with torch.no_grad():
        noise = 0.1 * torch.randn(SPEC.vocab, SPEC.hidden, generator=draw)
        model.model.embed_tokens.weight.copy_(chain[ids % CHAIN] + noise)
        model.lm_head.weight.zero_()
        model.lm_head.weight[(torch.arange(CHAIN) + 1) % CHAIN] = chain
    model.save_pretrained(folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return freeze(model)


def prompts(count: int, length: int = 6) -> list[list[int]]:
    """Random token ids."""
    draw = torch.Generator().manual_seed(7)
    ids: list[list[int]] = torch.randint(0, 250, (count, length), generator=draw).tolist()
    return ids


def as_target(model: Any, folder: Path) -> Target:
    """The model as the commands have it, without its tokenizer."""
    from dflash_export.sources.resolve import resolve_target
    from dflash_rt.text.prompts import PromptEncoder

    return Target(resolve_target(folder), model, PromptEncoder(), ())
