"""Drafters in the speculators format: tokens and accepted counts of a loop written out in PyTorch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dflash_export import build
from dflash_rt.backends.cpu.backend import OnnxRuntimeBackend
from tests.export.drafters.speculators_pairs import SpeculatorsLoop, make_speculators, speculators_config
from tests.marks import slow_but
from tests.pairs import TargetSpec, make_target, run_loop

FULL, SLIDING = "full_attention", "sliding_attention"
LEAST_MARGIN = 1e-5  # as in test_reference_loop.py
CHUNK = 8


@dataclass(frozen=True)
class Pair:
    """One architecture and its random weights: seeds, and the spread of the target's and the drafter's."""

    target: TargetSpec
    raw: dict[str, Any]
    weights: tuple[tuple[int, float, float], ...]
    narrower: tuple[int, ...] = ()
    long_prompt: int = 0


def pair(target: TargetSpec, *layer_types: str, weights: Any, **more: Any) -> Pair:
    own = {name: more.pop(name) for name in ("narrower", "long_prompt") if name in more}
    raw = speculators_config(target, layer_types=list(layer_types), **more)
    return Pair(target, raw, weights, **own)


PAIRS = {
    "whole vocabulary": pair(
        TargetSpec("qwen3", vocab=5), FULL, FULL, block_size=3, weights=((10, 0.5, 0.5), (7, 0.2, 0.2))
    ),
    "reduced vocabulary, causal windows": pair(
        TargetSpec("smollm2", vocab=8, tied=False),
        SLIDING,
        FULL,
        block_size=4,
        own_vocab=5,
        window=6,
        narrower=(2, 3),
        long_prompt=250,
        weights=((2, 0.2, 0.2), (3, 0.5, 0.5)),
    ),
    "windows both ways, smaller than a block": pair(
        TargetSpec("qwen3", vocab=4, layers=3),
        SLIDING,
        SLIDING,
        block_size=5,
        own_vocab=3,
        window=2,
        sliding_window_non_causal=True,
        narrower=(4,),
        weights=((4, 0.2, 0.2), (14, 0.5, 0.5)),
    ),
    "drafts from the anchor": pair(
        TargetSpec("qwen2", vocab=4, tied=False),
        SLIDING,
        FULL,
        block_size=3,
        own_vocab=3,
        window=3,
        sample_from_anchor=True,
        narrower=(2, 3),
        weights=((1, 0.5, 0.5), (7, 0.2, 0.2)),
    ),
    "only the anchor drafts": pair(
        TargetSpec("llama3", vocab=5),
        FULL,
        block_size=1,
        sample_from_anchor=True,
        weights=((1, 0.3, 0.3),),
    ),
}


def compare(pair: Pair, weights: tuple[int, float, float], folder: Path) -> Counter[int]:
    """Run both; returns how often each count was accepted at the full width."""
    seed, target_spread, drafter_spread = weights
    target = make_target(folder / "target", pair.target, seed=seed, spread=target_spread)
    make_speculators(folder / "drafter", pair.raw, seed=seed + 1000, spread=drafter_spread)
    bundle = build(folder / "target", folder / "drafter", folder / "bundle", prefill_chunk=CHUNK)
    reference = SpeculatorsLoop(target, folder / "drafter")
    backend = OnnxRuntimeBackend(bundle, threads=1)
    width = bundle.manifest.drafter.block_size
    assert width == pair.raw["block_size"] + pair.raw["sample_from_anchor"]
    generator = np.random.default_rng(seed)
    counts: Counter[int] = Counter()
    lengths = [(1, 30), (CHUNK - 1, 40), (CHUNK * 3 + 2, 30)]
    if pair.long_prompt:
        lengths.append((pair.long_prompt, 20))
    for rows, new_tokens in lengths:
        prompt = generator.integers(0, pair.target.vocab, rows).tolist()
        for used in (width, *pair.narrower):
            expected = reference.run(prompt, new_tokens, used - 1)
            assert reference.least_margin > LEAST_MARGIN, "a near tie, choose another seed"
            assert run_loop(backend, bundle, prompt, new_tokens, used) == expected, (rows, used)
            if used == width:
                counts.update(expected.accepted)
    return counts


@pytest.mark.parametrize("name", slow_but(PAIRS, "drafts from the anchor"))
def test_same_tokens_and_counts_as_written_out_in_pytorch(name: str, tmp_path: Path) -> None:
    counts: Counter[int] = Counter()
    for number, weights in enumerate(PAIRS[name].weights):
        counts += compare(PAIRS[name], weights, tmp_path / str(number))
    width = PAIRS[name].raw["block_size"] + PAIRS[name].raw["sample_from_anchor"]
    assert [count for count in range(width) if not counts[count]] == [], counts
