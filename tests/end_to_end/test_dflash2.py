"""DFlash 2 against the reference's own loop, PyPI dflash 0.1.0: tokens and accepted counts."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import dflash.model
import numpy as np
import pytest
import torch
from dflash.model import DFlash2DraftModel

from dflash_export import build
from dflash_rt import Generator, SamplingParams
from dflash_rt.backends.cpu.backend import OnnxRuntimeBackend
from tests.end_to_end.test_reference_loop import CHUNK, FULL, LEAST_MARGIN, SLIDING, Reference, window
from tests.marks import slow_but
from tests.pairs import TargetSpec, drafter_config, make_drafter, make_target, run_loop
from tests.rt.sampling.test_distribution import p_value


@dataclass(frozen=True)
class Pair:
    """One architecture and its random weights: seeds, and the spread of the target's and the drafter's."""

    target: TargetSpec
    raw: dict[str, Any]
    weights: tuple[tuple[int, float, float], ...]
    narrower: tuple[int, ...] = ()


def pair(target: TargetSpec, *, selector: tuple[int, int], conv: tuple[int, int], **more: Any) -> Pair:
    own = {name: more.pop(name) for name in ("weights", "narrower") if name in more}
    (rank, top_k), (taps, group) = selector, conv
    dflash2 = {
        "conv_kernel_size": taps,
        "conv_group_size": group,
        "selector_rank": rank,
        "selector_top_k": top_k,
    }
    dflash2 |= more.pop("dflash_config", {})
    raw = drafter_config(target, architectures=["DFlash2DraftModel"], dflash_config=dflash2, **more)
    return Pair(target, raw, **own)


PAIRS = {
    "as published": pair(
        TargetSpec("qwen3", vocab=6),
        selector=(8, 3),
        conv=(2, 16),
        block_size=4,
        **window(12, SLIDING, SLIDING, is_causal=False),
        narrower=(2, 3),
        weights=((6, 0.5, 0.5), (21, 0.5, 0.5)),
    ),
    "three taps, full layers": pair(
        TargetSpec("smollm2", vocab=5, tied=False),
        selector=(4, 5),
        conv=(3, 4),
        block_size=3,
        weights=((2, 0.4, 0.3), (8, 0.2, 0.2)),
    ),
    "wide, transformed logits": pair(
        TargetSpec("qwen2", vocab=3, layers=2),
        selector=(6, 2),
        conv=(2, 8),
        block_size=6,
        layers=1,
        **window(5, SLIDING),
        dflash_config={
            "final_logit_softcapping": 5.0,
            "output_multiplier": 1.3,
            "input_embedding_scale": 1.4,
        },
        narrower=(5,),
        weights=((54, 0.2, 0.2), (33, 0.5, 0.5)),
    ),
    "one tap, mixed layers": pair(
        TargetSpec("mistral", vocab=4, head_dim=16),
        selector=(3, 4),
        conv=(1, 32),
        block_size=2,
        **window(7, FULL, SLIDING),
        weights=((1, 0.5, 0.5), (20, 0.4, 0.3)),
    ),
}


class Reference2(Reference):
    """Also watches how near the scores of the best two candidates of a proposal ever were."""

    def __post_init__(self) -> None:
        super().__post_init__()
        selector = self.drafter.candidate_selector
        walk = selector.select

        def watched(
            hidden: torch.Tensor, logits: torch.Tensor, anchors: torch.Tensor, temperature: float
        ) -> Any:
            path, candidates, q = walk(hidden, logits, anchors, temperature)
            states, previous = selector.hidden_projection(hidden), anchors
            for row in range(hidden.shape[1]):
                gains = torch.einsum(
                    "br,vr->bv",
                    selector.predecessor_codebook(previous) * states[:, row],
                    selector.successor_codebook.weight,
                )
                scores = (logits[:, row] + gains).gather(-1, candidates[:, row]).topk(2).values
                kept = logits[:, row].topk(min(selector.top_k + 1, logits.shape[-1])).values
                near = float(kept[0, -2] - kept[0, -1]) if kept.shape[-1] > selector.top_k else 1.0
                self.least_margin = min(self.least_margin, float(scores[0, 0] - scores[0, 1]), near)
                previous = path[:, row]
            return path, candidates, q

        selector.select = watched


@pytest.fixture(autouse=True)
def _clock_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dflash.model, "_cuda_time", time.perf_counter)


def compare(pair: Pair, weights: tuple[int, float, float], folder: Path) -> Counter[int]:
    """Run both; returns how often each count was accepted at the full width."""
    seed, target_spread, drafter_spread = weights
    target = make_target(folder / "target", pair.target, seed=seed, spread=target_spread)
    make_drafter(folder / "drafter", pair.raw, seed=seed + 1000, spread=drafter_spread)
    bundle = build(folder / "target", folder / "drafter", folder / "bundle", prefill_chunk=CHUNK)
    drafter = DFlash2DraftModel.from_pretrained(folder / "drafter", dtype=torch.float32).eval()
    reference = Reference2(target, drafter)
    backend = OnnxRuntimeBackend(bundle, threads=1)
    block_size = bundle.manifest.drafter.block_size
    generator = np.random.default_rng(seed)
    counts: Counter[int] = Counter()
    for rows, new_tokens in ((1, 40), (CHUNK - 1, 50), (CHUNK * 3 + 2, 40)):
        prompt = generator.integers(0, pair.target.vocab, rows).tolist()
        for width in (block_size, *pair.narrower):
            expected = reference.run(prompt, new_tokens, width)
            assert reference.least_margin > LEAST_MARGIN, "a near tie, choose another seed"
            ours = run_loop(backend, bundle, prompt, new_tokens, width)
            assert ours.token_ids == expected.token_ids, (rows, width)
            assert ours.accepted[: len(expected.accepted)] == expected.accepted, (rows, width)
            if width == block_size:
                counts.update(expected.accepted)
    assert "select" in bundle.manifest.graphs
    return counts


@pytest.mark.parametrize("name", slow_but(PAIRS, "as published"))
def test_same_tokens_and_counts_as_the_reference(name: str, tmp_path: Path) -> None:
    counts: Counter[int] = Counter()
    for number, weights in enumerate(PAIRS[name].weights):
        counts += compare(PAIRS[name], weights, tmp_path / str(number))
    block_size = PAIRS[name].raw["dflash_config"]["block_size"]
    assert [count for count in range(block_size) if not counts[count]] == [], counts


# --- Sampling ---

RUNS, LENGTH, LEVEL = 3000, 3, 1e-6


@pytest.mark.slow
def test_sampled_tokens_have_the_targets_distribution(tmp_path: Path) -> None:
    """Whole requests on the graphs: the first three tokens of 3,000 seeds against PyTorch's probabilities.

    A chi-square test that a correct sampler fails by chance with probability 1e-6; the seeds are fixed.
    """
    used = PAIRS["as published"]
    spec = TargetSpec("qwen3", vocab=6)
    target = make_target(tmp_path / "target", spec, seed=6, spread=0.3)
    make_drafter(tmp_path / "drafter", used.raw, seed=1006, spread=0.3)
    bundle = build(tmp_path / "target", tmp_path / "drafter", tmp_path / "bundle", prefill_chunk=CHUNK)
    prompt, accepted = [1, 4, 0], Counter[int]()
    counts = np.zeros((spec.vocab,) * LENGTH)
    with Generator(bundle.root, threads=1) as generator:
        for seed in range(RUNS):
            sampling = SamplingParams(temperature=1.0, seed=seed)
            result = generator.generate(prompt, max_new_tokens=LENGTH, sampling=sampling)
            counts[result.token_ids] += 1
            accepted[result.stats.accepted_per_step[0]] += 1
        again = generator.generate(prompt, max_new_tokens=LENGTH, sampling=sampling)
        assert again.token_ids == result.token_ids  # same seed, same tokens
    assert set(accepted) == {0, 1, 2, 3}
    assert p_value(counts.ravel(), _joint(target, prompt, spec.vocab)) > LEVEL
    # What it can see: a quarter off in temperature.
    assert p_value(counts.ravel(), _joint(target, prompt, spec.vocab, 1.25)) < LEVEL


def _joint(target: Any, prompt: list[int], vocab: int, temperature: float = 1.0) -> Any:
    """Probability of every output, float64 ``[vocab ** LENGTH]``."""
    joint = np.ones(1)
    for length in range(LENGTH):
        prefixes = [[*prompt, *output] for output in product(range(vocab), repeat=length)]
        with torch.inference_mode():
            logits = target(torch.tensor(prefixes)).logits[:, -1].double()
        joint = (joint[:, None] * (logits / temperature).softmax(-1).numpy()).ravel()
    return joint
