"""The step of a build that quantises: the target writes text, its layers are watched, its graphs changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dflash_export.graphs.graph import TracedGraph
from dflash_export.pairing.read import Pair
from dflash_export.progress import Progress
from dflash_export.quantize.calibration import CALIBRATION_FILE, Calibration, Folding
from dflash_export.quantize.modelopt import calibrate, load_modelopt
from dflash_export.quantize.plan import QuantizePlan
from dflash_export.quantize.text import CALIBRATION_PROMPTS, CalibrationText, encode_prompts, write_text
from dflash_export.reference import load_target
from dflash_rt.bundle.manifest import QuantizationInfo
from dflash_rt.text.prompt_files import read_prompts
from dflash_rt.text.prompts import PromptEncoder

__all__ = ["Quantized", "check_calibration", "quantize_target"]


@dataclass(frozen=True, eq=False)
class Quantized:
    """The graphs of a bundle, and what happens to their weights; without ``info`` nothing.

    ``folded`` is what the target's parameters are multiplied with, ``calibration`` what their errors cost.
    """

    graphs: Mapping[str, TracedGraph]
    folded: Folding = field(default_factory=Folding)
    calibration: Calibration | None = None
    info: QuantizationInfo | None = None


def quantize_target(
    plan: QuantizePlan,
    graphs: Mapping[str, TracedGraph],
    pair: Pair,
    encoder: PromptEncoder,
    folder: Path,
    progress: Progress,
) -> Quantized:
    """Quantise ``graphs`` as planned. What calibration found is written to ``folder``.

    Raises what :meth:`QuantizePlan.apply` raises, and:
        VerifyError: PyTorch can't load the target, which a scheme with calibration does, in fp32.
    """
    repeats_values = pair.facts.num_attention_heads != pair.facts.num_key_value_heads
    plan.apply(graphs, None, repeats_values=repeats_values)  # refuses now what can't be quantised
    calibration = text = None
    if (method := plan.scheme.method) != "rtn":
        text, model = _write_text(plan, pair, encoder, progress)
        with progress.stage(f"calibrating with {text.tokens} tokens"):
            calibration = calibrate(model, text.rows, method, plan.target_form(graphs).block_size)
        calibration.save(folder / CALIBRATION_FILE)
    changed, folded = plan.apply(graphs, calibration, repeats_values=repeats_values)
    return Quantized(changed, folded, calibration, plan.info(graphs, changed, text))


def check_calibration(plan: QuantizePlan) -> None:
    """Refuse early what :func:`quantize_target` would refuse after minutes.

    Raises:
        RecipeError: nvidia-modelopt can't be imported.
        PromptError: the file of prompts can't be used.
    """
    if plan.scheme.method != "rtn":
        load_modelopt()
        _texts(plan)


def _texts(plan: QuantizePlan) -> list[str]:
    if plan.calib is None:
        return list(CALIBRATION_PROMPTS[: plan.calib_limit])
    return read_prompts(plan.calib, plan.calib_limit)


def _write_text(
    plan: QuantizePlan, pair: Pair, encoder: PromptEncoder, progress: Progress
) -> tuple[CalibrationText, Any]:
    """The text to calibrate with, and the target as PyTorch has it, which wrote it."""
    max_seq_len = pair.limits.max_seq_len
    tokens = min(plan.calib_tokens, max(1, max_seq_len // 2))
    prompts = encode_prompts(encoder, _texts(plan), pair.facts.vocab_size, max(1, max_seq_len - tokens))
    with progress.stage("writing text to calibrate with"):
        model = load_target(pair.target)
        with torch.inference_mode():
            return write_text(model, prompts, tokens, pair.stop_token_ids), model
