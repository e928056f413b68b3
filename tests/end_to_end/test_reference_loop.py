"""The whole loop on exported graphs against the reference implementation, PyPI dflash 0.1.0.

Random pairs with tiny vocabularies: drafts are confirmed by chance, so that every branch of the loop is
taken. Tokens and, step by step, the number of confirmed drafts have to be the same.

About ties. Both sides add up the same products in another order. Where the best two logits of a row are
nearer to each other than the rounding error (some 1e-6 here), either may win. The seeds were chosen so that
no two are that near (``LEAST_MARGIN``, which every run checks): on a machine that rounds in another way the
logits move by no more than that error, and the tokens stay.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dflash.model
import numpy as np
import pytest
import torch

from dflash_export import build
from dflash_rt.backends.cpu.backend import OnnxRuntimeBackend
from tests.pairs import (
    LINEAR_ROPE,
    YARN_ROPE,
    Run,
    TargetSpec,
    drafter_config,
    make_drafter,
    make_target,
    old_schema,
    reference_drafter,
    run_loop,
)

LEAST_MARGIN = 1e-5
CHUNK = 8
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Pair:
    """One architecture, and its random weights: a seed, the spread of the target's and of the drafter's.

    ``narrower`` are widths below ``block_size`` to be tried too; ``long_prompt`` a prompt that outgrows the
    first buffers, for the first weights only. ``fused``: the target has a fused form, which runs then.
    """

    name: str
    target: TargetSpec
    drafter: dict[str, Any]
    weights: tuple[tuple[int, float, float], ...]
    narrower: tuple[int, ...] = ()
    old: bool = False
    long_prompt: int = 0
    fused: bool = False


def window(size: int, *layer_types: str, **more: Any) -> dict[str, Any]:
    return {"use_sliding_window": True, "sliding_window": size, "layer_types": list(layer_types), **more}


def pair(
    name: str, family: str, block_size: int, layers: int, *, target: dict[str, Any], **more: Any
) -> Pair:
    spec = TargetSpec(family, **target)
    own = {
        key: more.pop(key) for key in ("weights", "narrower", "old", "long_prompt", "fused") if key in more
    }
    raw = drafter_config(spec, layers=layers, block_size=block_size, **more)
    return Pair(name, spec, old_schema(raw) if own.get("old") else raw, **own)


PAIRS: dict[int, list[Pair]] = {
    2: [
        pair(
            "plain",
            "qwen3",
            2,
            1,
            target={"vocab": 4, "tied": False},
            old=True,
            weights=((14, 0.3, 0.15), (2, 0.3, 0.15), (14, 0.4, 0.3), (15, 0.2, 0.2)),
        ),
        pair(
            "mixed",
            "llama3",
            2,
            2,
            target={"vocab": 6, "heads": 6, "hidden": 48, "head_dim": 12},
            **window(6, SLIDING, FULL),
            dflash_config={"target_layer_ids": [1]},
            weights=((7, 0.2, 0.2), (10, 0.2, 0.2), (8, 0.5, 0.5), (6, 0.3, 0.15)),
        ),
    ],
    3: [
        pair(
            "bias, causal",
            "qwen2",
            3,
            3,
            target={"vocab": 5, "layers": 2},
            attention_bias=True,
            is_causal=True,
            dflash_config={"target_layer_ids": [1, 0]},
            weights=((1, 0.2, 0.2), (9, 0.5, 0.5), (3, 0.5, 0.5), (7, 0.3, 0.15)),
        ),
        pair(
            "windows both ways",
            "mistral",
            3,
            2,
            target={"vocab": 6, "tied": False, "head_dim": 16},
            **window(5, SLIDING, SLIDING, is_causal=False),
            narrower=(2,),
            long_prompt=240,
            weights=((7, 0.2, 0.2), (19, 0.2, 0.2), (2, 0.3, 0.15), (8, 0.2, 0.2)),
        ),
    ],
    4: [
        pair(
            "transformed logits",
            "smollm2",
            4,
            2,
            target={"vocab": 8},
            final_logit_softcapping=6.0,
            output_multiplier=0.7,
            dflash_config={"input_embedding_scale": 1.7},
            weights=((0, 0.3, 0.15), (4, 0.4, 0.3), (2, 0.2, 0.2), (21, 0.5, 0.5)),
        ),
        pair(
            "yarn, old schema",
            "qwen3_moe",
            4,
            2,
            target={"vocab": 5, "layers": 2, "tied": False},
            rope_parameters=YARN_ROPE,
            old=True,
            narrower=(3,),
            weights=((0, 0.2, 0.2), (7, 0.2, 0.2), (24, 0.2, 0.2), (13, 0.5, 0.5)),
        ),
        # What the fused form is made from; the drafter is the same for all.
        pair(
            "fused",
            "smollm2",
            4,
            1,
            target={"vocab": 6, "layers": 2, "head_dim": 16},
            fused=True,
            narrower=(3,),
            long_prompt=250,
            weights=((0, 0.2, 0.2), (1, 0.3, 0.15)),
        ),
        pair(
            "fused, llama3 rope",
            "llama3",
            4,
            1,
            target={"vocab": 6, "layers": 2, "head_dim": 16, "kv_heads": 1, "tied": False},
            fused=True,
            weights=((0, 0.2, 0.2), (1, 0.3, 0.15)),
        ),
        pair(
            "fused, biases",
            "qwen2",
            4,
            1,
            target={"vocab": 6, "layers": 2, "heads": 2},
            fused=True,
            weights=((0, 0.3, 0.15), (1, 0.3, 0.15)),
        ),
    ],
    8: [
        pair(
            "three kinds of layer",
            "qwen3",
            8,
            3,
            target={"vocab": 5, "kv_heads": 1, "head_dim": 16},
            fused=True,
            **window(9, FULL, SLIDING, FULL),
            dflash_config={"target_layer_ids": [2, 0, 1]},
            narrower=(2, 5),
            long_prompt=250,
            weights=((20, 0.3, 0.15), (15, 0.2, 0.2), (8, 0.5, 0.5), (15, 0.4, 0.3)),
        ),
        pair(
            "linear rope",
            "llama3",
            8,
            1,
            target={"vocab": 4, "tied": False},
            rope_parameters=LINEAR_ROPE,
            is_causal=False,
            output_multiplier=1.5,
            weights=((27, 0.5, 0.5), (23, 0.3, 0.15), (10, 0.5, 0.5), (17, 0.3, 0.15)),
        ),
        pair(
            "causal everywhere",
            "qwen2",
            8,
            2,
            target={"vocab": 4, "layers": 2, "kv_heads": 4},
            **window(20, SLIDING, FULL, is_causal=True),
            narrower=(7,),
            weights=((10, 0.2, 0.2), (54, 0.5, 0.5), (49, 0.5, 0.5), (42, 0.5, 0.5)),
        ),
    ],
    16: [
        pair(
            "wide",
            "qwen3",
            16,
            2,
            target={"vocab": 4, "layers": 2},
            narrower=(4, 15),
            long_prompt=235,
            weights=((75, 0.2, 0.2), (138, 0.4, 0.3), (33, 0.5, 0.5), (81, 0.4, 0.3), (82, 0.4, 0.3)),
        ),
        pair(
            "wide, windows",
            "smollm2",
            16,
            2,
            target={"vocab": 4, "tied": False},
            **window(12, SLIDING, FULL),
            weights=((47, 0.4, 0.3), (35, 0.4, 0.3), (98, 0.4, 0.3), (83, 0.2, 0.2), (113, 0.3, 0.15)),
        ),
        pair(
            "wide, windows smaller than a block",
            "mistral",
            16,
            1,
            target={"vocab": 4, "layers": 2},
            **window(5, SLIDING, is_causal=False),
            weights=((60, 0.5, 0.5), (2, 0.3, 0.15), (89, 0.3, 0.15), (68, 0.5, 0.5), (98, 0.2, 0.2)),
        ),
    ],
}


@dataclass
class Reference:
    """Greedy runs of PyPI dflash, and how close the best two logits of any row ever were."""

    target: Any
    drafter: Any
    least_margin: float = field(default=float("inf"))

    def __post_init__(self) -> None:
        self.target.lm_head.register_forward_hook(self._watch)

    def _watch(self, module: Any, inputs: Any, logits: torch.Tensor) -> None:
        best = logits.topk(2).values
        self.least_margin = min(self.least_margin, float((best[..., 0] - best[..., 1]).min()))

    def generate(self, prompt: list[int], new_tokens: int) -> list[int]:
        """Hugging Face's own greedy decoding."""
        ids = torch.tensor([prompt])
        # Without a mask it would take prompt tokens that equal the padding token for padding.
        output = self.target.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens
        )
        return output[0, len(prompt) :].tolist()

    def run(self, prompt: list[int], new_tokens: int, width: int) -> Run:
        """``accepted`` has only the steps at which a whole block still fitted; the reference clips others."""
        result = dflash.model.dflash_generate(
            self.drafter,
            self.target,
            torch.tensor([prompt]),
            new_tokens,
            None,
            block_size=width,
            return_stats=True,
        )
        start, accepted = 0, []
        for produced in result.acceptance_lengths:
            if start + width >= new_tokens:
                break
            accepted.append(produced - 1)
            start += produced
        return Run(result.output_ids[0, len(prompt) :].tolist(), accepted)


def requests(pair: Pair, seed: int) -> Iterator[tuple[list[int], int]]:
    """Prompts from one token to several chunks, each with how many tokens are wanted."""
    generator = np.random.default_rng(seed)
    lengths = [(1, 40), (CHUNK - 1, 60), (CHUNK * 3 + 2, 50)]
    if pair.long_prompt and seed == pair.weights[0][0]:
        lengths.append((pair.long_prompt, 60))
    for rows, new_tokens in lengths:
        yield generator.integers(0, pair.target.vocab, rows).tolist(), new_tokens


@pytest.fixture(autouse=True)
def _clock_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dflash.model, "_cuda_time", time.perf_counter)


def compare(pair: Pair, weights: tuple[int, float, float], folder: Path) -> Counter[int]:
    """Run everything both ways; returns how often each count was confirmed at the full width."""
    seed, target_spread, drafter_spread = weights
    target = make_target(folder / "target", pair.target, seed=seed, spread=target_spread)
    make_drafter(folder / "drafter", pair.drafter, seed=seed + 1000, spread=drafter_spread)
    bundle = build(folder / "target", folder / "drafter", folder / "bundle", prefill_chunk=CHUNK)
    assert (bundle.fused_path("target") is not None) == pair.fused  # the backend runs it where it is there
    reference = Reference(target, reference_drafter(folder / "drafter"))
    backend = OnnxRuntimeBackend(bundle, threads=1)
    block_size = bundle.manifest.drafter.block_size
    counts: Counter[int] = Counter()
    for prompt, new_tokens in requests(pair, seed):
        where = f"{pair.name}, weights {weights}, {len(prompt)} prompt tokens"
        plain = run_loop(backend, bundle, prompt, new_tokens, 1)
        assert plain.accepted == [0] * (new_tokens - 1)
        assert plain.token_ids == reference.generate(prompt, new_tokens), where
        for width in (block_size, *pair.narrower):
            expected = reference.run(prompt, new_tokens, width)
            assert reference.least_margin > LEAST_MARGIN, f"{where}: a near tie, choose another seed"
            ours = run_loop(backend, bundle, prompt, new_tokens, width)
            assert ours.token_ids == expected.token_ids, f"{where}, width {width}"
            assert ours.accepted[: len(expected.accepted)] == expected.accepted, f"{where}, width {width}"
            if width == block_size:
                counts.update(expected.accepted)
    if pair.long_prompt and weights == pair.weights[0]:
        assert backend.capacity > 256  # it grew in the middle of a sequence
    return counts


# One of each kind: a drafter with a window, causal, over transformed logits, and a target in its fused form.
FAST = ("mixed", "bias, causal", "transformed logits", "fused")


@pytest.mark.parametrize("name", FAST)
def test_one_pair(name: str, tmp_path: Path) -> None:
    (pair,) = (pair for pairs in PAIRS.values() for pair in pairs if pair.name == name)
    assert compare(pair, pair.weights[0], tmp_path).keys() > {0}


@pytest.mark.slow
@pytest.mark.parametrize("block_size", sorted(PAIRS))
def test_same_tokens_and_counts_as_the_reference(block_size: int, tmp_path: Path) -> None:
    counts: Counter[int] = Counter()
    for pair in PAIRS[block_size]:
        for number, weights in enumerate(pair.weights):
            counts += compare(pair, weights, tmp_path / f"{pair.name} {number}")
    assert [count for count in range(block_size) if not counts[count]] == [], counts


def test_there_are_enough_pairs() -> None:
    assert sum(len(pair.weights) for pairs in PAIRS.values() for pair in pairs) >= 40
