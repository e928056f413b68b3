"""The step of a build that calibrates: load the target, let it write, see what its layers read."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch

from dflash_export.graphs.stored_weight import WeightFormat
from dflash_export.progress import Progress
from dflash_export.quantize.calibration import Calibration
from dflash_export.quantize.modelopt import calibrate, load_modelopt
from dflash_export.quantize.plan import QuantizePlan
from dflash_export.quantize.text import CALIBRATION_PROMPTS, CalibrationText, encode_prompts, write_text
from dflash_export.reference import load_target
from dflash_export.sources.resolve import Source
from dflash_rt.cli.console import read_prompts
from dflash_rt.text.prompts import PromptEncoder

__all__ = ["Calibrated", "calibrate_target", "check_calibration"]


@dataclass(frozen=True)
class Calibrated:
    """What was found out, and on which text."""

    layers: Calibration
    text: CalibrationText


def check_calibration(plan: QuantizePlan) -> None:
    """Refuse early what :func:`calibrate_target` would refuse after minutes.

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
    return read_prompts(Path(plan.calib), plan.calib_limit)


def calibrate_target(
    plan: QuantizePlan,
    form: WeightFormat,
    target: Source,
    encoder: PromptEncoder,
    vocab_size: int,
    max_seq_len: int,
    stop_token_ids: Collection[int],
    progress: Progress,
) -> Calibrated | None:
    """Calibrate as planned for weights in ``form``; ``None`` for a scheme that needs no text.

    Loads the target in fp32.

    Raises:
        VerifyError: PyTorch can't load the target.
    """
    method = plan.scheme.method
    if method == "rtn":
        return None
    tokens = min(plan.calib_tokens, max(1, max_seq_len // 2))
    prompts = encode_prompts(encoder, _texts(plan), vocab_size, max(1, max_seq_len - tokens))
    with progress.stage("writing text to calibrate with"):
        model = load_target(target)
        with torch.inference_mode():
            text = write_text(model, prompts, tokens, stop_token_ids)
    with progress.stage(f"calibrating with {text.tokens} tokens"):
        return Calibrated(calibrate(model, text.rows, method, form.block_size), text)
