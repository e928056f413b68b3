"""Engines of the graphs that only some drafters have, built for real; see test_engines.py."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest

from dflash_export import build, compile_engines
from dflash_rt.bundle.engine_sets import read_engines
from tests.export.drafters.speculators_pairs import make_speculators, speculators_config
from tests.marks import slow_but
from tests.pairs import TargetSpec, drafter_config, make_drafter, make_target

pytest.importorskip("tensorrt_rtx", reason="engines are built: pip install 'dflash-export[tensorrt-rtx]'")

FULL, SLIDING = "full_attention", "sliding_attention"
# 16 is the smallest head size with a fused kernel.
SPEC = TargetSpec("qwen3", hidden=64, heads=4, kv_heads=2, head_dim=16, layers=3, vocab=40)
DFLASH2 = {"conv_kernel_size": 2, "conv_group_size": 16, "selector_rank": 32, "selector_top_k": 16}


def save_speculators(folder: Path) -> None:
    raw = speculators_config(
        SPEC,
        layer_types=[SLIDING, FULL],
        block_size=5,
        own_vocab=24,
        window=6,
        sample_from_anchor=True,
    )
    raw["transformer_layer_config"]["head_dim"] = 16
    make_speculators(folder, raw, seed=1, spread=0.2)


def save_dflash2(folder: Path) -> None:
    more: dict[str, Any] = {"final_logit_softcapping": 20.0}
    raw = drafter_config(
        SPEC,
        head_dim=16,
        block_size=6,
        architectures=["DFlash2DraftModel"],
        dflash_config=DFLASH2 | more,
        is_causal=False,
        layer_types=[SLIDING, SLIDING],
        sliding_window=6,
        use_sliding_window=True,
    )
    make_drafter(folder, raw)


FAST = [(save_speculators, "fp16"), (save_dflash2, "bf16")]


@pytest.mark.parametrize(
    ("save", "precision"),
    slow_but(product([save_speculators, save_dflash2], ["fp32", "fp16", "bf16"]), *FAST),
)
def test_every_graph_is_built(save: Any, precision: str, tmp_path: Path) -> None:
    make_target(tmp_path / "target", SPEC)
    save(tmp_path / "drafter")
    bundle = build(
        tmp_path / "target",
        tmp_path / "drafter",
        tmp_path / "bundle",
        precision=precision,
        max_seq_len=60,
        prefill_chunk=16,
    )
    result = compile_engines(bundle, backend="tensorrt-rtx", compute_capabilities=(89,))
    assert set(result.built) == set(bundle.manifest.graphs)
    assert read_engines(result.folder) == result.engines
    own = {"draft_embed", "draft_lm_head"} if save is save_speculators else {"draft_logits", "select"}
    for graph in own:
        profiles = [(p.name, p.rows.min, p.rows.max) for p in result.engines.engines[graph].profiles]
        assert profiles == [("block", 1, 6)]
