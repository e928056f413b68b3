"""Logits, features and draft states of exported graphs against PyTorch, for every family and RoPE variant.

The graphs run over caches that are full of junk in the rows that aren't committed, in pieces of several
sizes, and over caches that grow on the way. PyTorch sees the whole sequence at once, without any cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dflash_export import build
from tests.marks import slow_but
from tests.pairs import (
    FAMILIES,
    LINEAR_ROPE,
    LLAMA3_ROPE,
    YARN_ROPE,
    Array,
    Graphs,
    TargetSpec,
    drafter_config,
    make_drafter,
    make_target,
    old_schema,
    reference_drafter,
)

TOLERANCE = 1e-4
PIECES = (1, 5, 3, 1, 8, 2, 16, 4)  # rows of each call: 40 in all
FIRST_CAPACITY = 16

# Every family with every value: tied and untied, 1, 2 and 3 query heads to a key/value head, a head size that
# is hidden size / heads and one that isn't. Qwen2 alone has no head_dim of its own.
SHAPES: dict[str, dict[str, Any]] = {
    "tied, ratio 1": {"tied": True, "heads": 4, "kv_heads": 4},
    "untied, ratio 2, own head size": {"tied": False, "heads": 4, "kv_heads": 2, "head_dim": 12},
    "tied, ratio 3, own head size": {"tied": True, "heads": 6, "kv_heads": 2, "hidden": 48, "head_dim": 10},
    "untied, ratio 8": {"tied": False, "heads": 8, "kv_heads": 1},
}
WITH_EVERY_FAMILY = list(SHAPES)[:3]
MORE_TARGETS = {
    "qwen3, mixed windows": TargetSpec(
        "qwen3",
        more={
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["full_attention", "sliding_attention"],
        },
    ),
    "qwen2, windows from layer 1": TargetSpec(
        "qwen2", more={"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
    ),
    "qwen3, attention bias": TargetSpec("qwen3", more={"attention_bias": True}),
    "llama, all biases": TargetSpec("smollm2", head_dim=16, more={"attention_bias": True, "mlp_bias": True}),
    "mistral, no window": TargetSpec(
        "mistral", tied=False, heads=6, head_dim=16, more={"sliding_window": None}
    ),
    "moe, dense layers between": TargetSpec(
        "qwen3_moe", more={"decoder_sparse_step": 2, "norm_topk_prob": False, "num_experts_per_tok": 3}
    ),
    "qwen3, yarn": TargetSpec("qwen3", more={"rope_parameters": YARN_ROPE}),
    "llama, linear rope": TargetSpec("smollm2", head_dim=16, more={"rope_parameters": LINEAR_ROPE}),
    "mistral, yarn with factors": TargetSpec(
        "mistral",
        head_dim=16,
        more={
            "sliding_window": None,
            "rope_parameters": {**YARN_ROPE, "attention_factor": 0.7, "beta_fast": 16.0, "beta_slow": 2.0},
        },
    ),
    "smollm2, ratio 8": TargetSpec("smollm2", **{**SHAPES["untied, ratio 8"], "head_dim": 32}),
    "llama3, heads of 16": TargetSpec("llama3", head_dim=16),
    "qwen2, heads of 16": TargetSpec("qwen2", heads=2, kv_heads=2),
}
# Those that have a fused form, which is run too.
FUSED = (
    "llama, all biases",
    "mistral, no window",
    "llama, linear rope",
    "mistral, yarn with factors",
    "smollm2, ratio 8",
    "llama3, heads of 16",
    "qwen2, heads of 16",
)
TARGETS = {
    **{
        f"{family}, {shape}": TargetSpec(family, **SHAPES[shape])
        for family in FAMILIES
        for shape in WITH_EVERY_FAMILY
    },
    **MORE_TARGETS,
}
TARGETS = {
    name: replace(spec, layers=2, head_dim=None if spec.family == "qwen2" else spec.head_dim)
    for name, spec in TARGETS.items()
}


def pieces(rows: int) -> Iterator[tuple[int, int]]:
    """First row and number of rows of each call, over and over the sizes of ``PIECES``."""
    start, index = 0, 0
    while start < rows:
        count = min(PIECES[index % len(PIECES)], rows - start)
        yield start, count
        start, index = start + count, index + 1


def largest_difference(ours: Array, theirs: torch.Tensor) -> float:
    assert ours.shape == tuple(theirs.shape)
    return float(np.abs(ours - theirs.numpy()).max())


def torch_states(model: Any, token_ids: Array, taps: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits ``[batch, rows, vocab]`` and features ``[batch, rows, taps * hidden]`` of whole sequences."""
    with torch.inference_mode():
        output = model(torch.from_numpy(token_ids), output_hidden_states=True, use_cache=False)
    return output.logits, torch.cat([output.hidden_states[layer + 1] for layer in taps], -1)


# Each family once, its shapes in turn, and what only some targets have.
FAST = [
    f"{family}, {shape}" for family, shape in zip(FAMILIES, itertools.cycle(WITH_EVERY_FAMILY), strict=False)
]
FAST += [
    "qwen3, mixed windows",
    "llama, all biases",
    "moe, dense layers between",
    "mistral, yarn with factors",
]


@pytest.mark.parametrize("name", slow_but(TARGETS, *FAST))
def test_target(name: str, tmp_path: Path) -> None:
    spec = TARGETS[name]
    model = make_target(tmp_path / "target", spec)
    taps = (spec.layers - 1, 0)  # the last layer's output is tapped after the final norm
    raw = drafter_config(spec, layers=1, dflash_config={"target_layer_ids": list(taps)})
    make_drafter(tmp_path / "drafter", raw)
    bundle = build(tmp_path / "target", tmp_path / "drafter", tmp_path / "bundle")
    assert (bundle.fused_path("target") is not None) == (name in FUSED)
    token_ids = np.random.default_rng(0).integers(0, spec.vocab, (2, 40))
    logits, features = torch_states(model, token_ids, taps)
    assert logits.std() > 0.1  # or nearly anything would pass

    # One sequence, in pieces, over caches that grow twice.
    for fused in (False, True) if name in FUSED else (False,):
        graphs = Graphs(bundle, fused=fused)
        caches = graphs.junk_caches("target", 1, FIRST_CAPACITY)
        for start, count in pieces(40):
            capacity = next(iter(caches.values())).shape[2]
            if start + count > capacity:
                graphs.grow(caches, max(2 * capacity, start + count))
            out = graphs.target(caches, token_ids[:1, start : start + count], np.array([start]))
            rows = slice(start, start + count)
            assert largest_difference(out["logits"], logits[:1, rows]) < TOLERANCE, f"fused: {fused}"
            assert largest_difference(out["features"], features[:1, rows]) < TOLERANCE, f"fused: {fused}"
            assert (out["token_ids"] == out["logits"].argmax(-1)).all()

    # Two sequences at places of their own, which the fused form doesn't take. The second is set back after
    # each call, as after rejections.
    graphs = Graphs(bundle)
    caches = graphs.junk_caches("target", 2, 64)
    start = np.zeros(2, np.int64)
    for _, count in pieces(40):
        if start.max() + count > 40:
            break
        rows = start[:, None] + np.arange(count)
        slots = np.arange(2)[:, None]
        out = graphs.target(caches, token_ids[slots, rows], start)
        assert largest_difference(out["logits"], logits[slots, rows]) < TOLERANCE
        assert largest_difference(out["features"], features[slots, rows]) < TOLERANCE
        start = start + np.array([count, (count + 1) // 2])
    assert start[0] > start[1] > 0


SLIDING = {"use_sliding_window": True, "sliding_window": 6}
MIXED = {**SLIDING, "layer_types": ["sliding_attention", "full_attention"], "layers": 2}
DRAFTERS: dict[str, dict[str, Any]] = {
    "three layers": {"layers": 3},
    "mixed": MIXED,
    "windows smaller than a block": {**MIXED, "sliding_window": 3, "is_causal": False},
    "mixed, all causal": {**MIXED, "is_causal": True},
    "bias, one head to a key": {"attention_bias": True, "num_key_value_heads": 4},
    "four heads to a key": {"num_key_value_heads": 1},
    "head size from hidden size": {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16},
    "another activation": {"hidden_act": "gelu"},
    "yarn": {"rope_parameters": YARN_ROPE},
    "linear rope": {"rope_parameters": LINEAR_ROPE},
    "llama3 rope": {"rope_parameters": LLAMA3_ROPE},
    "transformed logits": {
        "final_logit_softcapping": 3.0,
        "output_multiplier": 0.4,
        "dflash_config": {"input_embedding_scale": 2.5},
    },
}


CASES = list(zip(DRAFTERS, itertools.cycle(["new", "old"]), strict=False))


@pytest.mark.parametrize(
    ("name", "schema"),
    slow_but(
        CASES,
        ("mixed", "old"),
        ("bias, one head to a key", "new"),
        ("transformed logits", "old"),
        ("yarn", "new"),
    ),
)
def test_drafter(name: str, schema: str, tmp_path: Path) -> None:
    """Inject and draft, with rejected rows in between, against the reference's drafter without a cache."""
    spec = TargetSpec("qwen3", layers=2)
    model = make_target(tmp_path / "target", spec)
    raw = drafter_config(spec, **{"layers": 1, **DRAFTERS[name]})
    raw = old_schema(raw) if schema == "old" else raw
    make_drafter(tmp_path / "drafter", raw)
    graphs = Graphs(build(tmp_path / "target", tmp_path / "drafter", tmp_path / "bundle"))
    reference = reference_drafter(tmp_path / "drafter")
    generator = np.random.default_rng(0)
    width = len(reference.target_layer_ids) * spec.hidden
    features = generator.normal(0, 2, (2, 40, width)).astype(np.float32)
    rejected = generator.normal(0, 2, (2, 4, width)).astype(np.float32)
    blocks = np.full((2, 4), graphs.manifest.drafter.mask_token_id)
    caches = graphs.junk_caches("draft", 2, 48)

    start = np.zeros(2, np.int64)
    for count in (9, 1, 4, 2, 3, 4):
        rows, slots = start[:, None] + np.arange(count), np.arange(2)[:, None]
        feeds = features[slots, rows]
        kept = np.array([count, max(1, count - 1)])
        feeds[1, kept[1] :] = rejected[1, : count - kept[1]]
        graphs.run("inject", caches, features=feeds, start=start)
        start = start + kept
        blocks[:, 0] = generator.integers(0, spec.vocab, 2)
        embeddings = graphs.run("embed", input_ids=blocks)["embeddings"]
        hidden = graphs.run("draft", caches, embeddings=embeddings, start=start)["hidden"]
        logits = graphs.run("lm_head", hidden=hidden)["logits"]
        if "draft_logits" in graphs.manifest.graphs:
            logits = graphs.run("draft_logits", logits=logits)["logits.out"]
        for slot, committed in enumerate(start):
            expected = draft(reference, model, features[slot, :committed], blocks[slot])
            assert largest_difference(hidden[slot], expected[0]) < TOLERANCE
            assert largest_difference(logits[slot], expected[1]) < TOLERANCE


def draft(reference: Any, model: Any, features: Array, block: Array) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and logits of one block after ``features [rows, taps * hidden]``, by the reference."""
    scale = reference.config.dflash_config.get("input_embedding_scale", 1.0)
    with torch.inference_mode():
        embeddings = model.get_input_embeddings()(torch.from_numpy(block)[None]) * scale
        hidden = reference(
            position_ids=torch.arange(len(features) + len(block))[None],
            noise_embedding=embeddings,
            target_hidden=torch.from_numpy(features)[None],
        )
        return hidden[0], reference.compute_logits(hidden, model.lm_head)[0]
