"""The step of a build that quantises: the target writes text, its layers are watched, its graphs changed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from dflash_export.errors import RecipeError
from dflash_export.graphs.graph import CodeType, TracedGraph, WeightFormat
from dflash_export.options import BuildOptions, HeadType, QuantizeName
from dflash_export.pairing.read import Pair
from dflash_export.progress import Progress
from dflash_export.quantize.calibration import CALIBRATION_FILE, Calibration, Folding, folding
from dflash_export.quantize.graph_pass import InputTreatment, quantize_graph
from dflash_export.quantize.modelopt import calibrate, load_modelopt
from dflash_export.quantize.text import CALIBRATION_PROMPTS, CalibrationText, encode_prompts, write_text
from dflash_export.reference import load_target
from dflash_rt.bundle.manifest import CalibrationInfo, QuantizationInfo
from dflash_rt.text.prompt_files import read_prompts
from dflash_rt.text.prompts import PromptEncoder

__all__ = ["QuantizePlan", "Quantized", "check_calibration", "make_plan", "quantize_target"]


@dataclass(frozen=True)
class Scheme:
    """Types of weights and activations (None: as they are), and how the numbers are found."""

    weights: CodeType
    activations: Literal["int8", "fp8"] | None
    method: Literal["awq", "smoothquant", "max", "rtn"]

    @property
    def has_blocks(self) -> bool:
        """Whether blocks of inputs share a scale; with rounded activations that would be no product."""
        return self.activations is None


_SCHEMES: Mapping[QuantizeName, Scheme] = {
    "int4": Scheme("int4", None, "awq"),
    "int4-rtn": Scheme("int4", None, "rtn"),
    "int8": Scheme("int8", "int8", "smoothquant"),
    "int8-weight-only": Scheme("int8", None, "rtn"),
    "fp8": Scheme("fp8", "fp8", "max"),
}

# The first that divides the inputs of every layer. 128 is AWQ's. Models that it doesn't fit are small, and
# small ones need small blocks: the demo's target keeps more of its tokens with 32 than with 64.
_INT4_BLOCKS, _INT8_BLOCKS = (128, 32, 16), (32, 16)
_DEFAULT_PROMPTS, _DEFAULT_TOKENS = 32, 48
_FEATURE_PROJECTION = "drafter.fc.weight"


@dataclass(frozen=True)
class QuantizePlan:
    """``block_size`` None lets each graph have what fits; ``calib_*`` are about the text."""

    scheme: Scheme
    block_size: int | None
    head: HeadType | None
    drafter: bool
    measure: bool
    calib: Path | None
    calib_limit: int
    calib_tokens: int

    def target_form(self, graphs: Mapping[str, TracedGraph]) -> WeightFormat:
        """Of the target's linear layers."""
        if not self.scheme.has_blocks:
            return WeightFormat(self.scheme.weights, None)
        choices = _INT4_BLOCKS if self.scheme.weights == "int4" else _INT8_BLOCKS
        return WeightFormat(self.scheme.weights, self.block_size or _fitting(graphs["target"], choices))

    def apply(
        self,
        graphs: Mapping[str, TracedGraph],
        calibration: Calibration,
        *,
        repeats_values: bool,
    ) -> tuple[dict[str, TracedGraph], Folding]:
        """The graphs with the planned ones replaced, and what happens to their parameters.

        Raises what :func:`quantize_graph` raises.
        """
        folded = folding(calibration, repeats_values=repeats_values)
        inputs = {}
        for name, layer in calibration.layers.items():
            factor = None if layer.multiplier is None or name not in folded.divided else 1 / layer.multiplier
            inputs[name] = InputTreatment(factor, layer.largest if self.scheme.activations else None)
        changed = {"target": quantize_graph(graphs["target"], self.target_form(graphs), inputs)}
        # The head chooses the tokens, of the target and of the drafter, and drafters are small: 8 bits unless
        # 4 are asked for, and nothing that would have to be calibrated.
        others: dict[str, CodeType] = {} if self.head is None else {"lm_head": self.head}
        others |= dict.fromkeys(("inject", "draft"), "int8") if self.drafter else {}
        for name, weights in others.items():
            graph = graphs[name]
            size = self.block_size or _fitting(graph, _INT8_BLOCKS if weights == "int8" else _INT4_BLOCKS)
            skip = [key for key in graph.weights if key.startswith(_FEATURE_PROJECTION)]
            changed[name] = quantize_graph(graph, WeightFormat(weights, size), skip=skip)
        return {**graphs, **changed}, folded

    def info(
        self,
        before: Mapping[str, TracedGraph],
        after: Mapping[str, TracedGraph],
        text: CalibrationText | None,
    ) -> QuantizationInfo:
        """What the manifest says, but for the cost."""
        return QuantizationInfo(
            weights=self.scheme.weights,
            activations=self.scheme.activations,
            head=self.head,
            drafter="int8" if self.drafter else None,
            block_size=self.target_form(before).block_size,
            method=self.scheme.method,
            calibration=None if text is None else CalibrationInfo(text.prompts, text.tokens, text.sha256),
            bytes=_bytes(after),
            bytes_before=_bytes(before),
            cost=None,
        )


def make_plan(options: BuildOptions) -> QuantizePlan | None:
    """The plan behind a build's options; ``None`` if nothing is quantised.

    Raises:
        RecipeError: an option that the choice of ``quantize`` has no use for.
    """
    calibrating = {name: getattr(options, name) for name in ("calib", "calib_limit", "calib_tokens")}
    names = ("quantize_block", "quantize_head", "quantize_drafter", "measure_quantization", "measure_tokens")
    given = {name: getattr(options, name) for name in names} | calibrating
    if options.quantize is None:
        _refuse_useless(given, given, "quantize", f"quantize: one of {', '.join(_SCHEMES)}")
        return None
    scheme, head = _SCHEMES[options.quantize], options.quantize_head
    if not scheme.has_blocks and not head and not options.quantize_drafter:
        _refuse_useless(
            given, ("quantize_block",), "blocks", f"{options.quantize} has one scale for an output"
        )
    if options.measure_quantization is False:
        _refuse_useless(given, ("measure_tokens",), "a measurement", "no measure_quantization: false")
    if scheme.method == "rtn":
        expected = f"{options.quantize} rounds to nearest without any text"
        _refuse_useless(given, calibrating, "calibration", expected)
    return QuantizePlan(
        scheme=scheme,
        block_size=options.quantize_block,
        head="int8" if head is True else head or None,
        drafter=bool(options.quantize_drafter),
        measure=options.measure_quantization is not False,
        calib=None if options.calib is None else Path(options.calib),
        calib_limit=options.calib_limit or _DEFAULT_PROMPTS,
        calib_tokens=options.calib_tokens or _DEFAULT_TOKENS,
    )


@dataclass(frozen=True, eq=False)
class Quantized:
    """The graphs of a bundle, and what happens to their weights; without ``info`` nothing.

    ``folded`` is what the target's parameters are multiplied with, ``calibration`` what their errors cost.
    """

    graphs: Mapping[str, TracedGraph]
    folded: Folding = field(default_factory=Folding)
    calibration: Calibration = field(default_factory=Calibration)
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
    calibration, text = Calibration(), None
    plan.apply(graphs, calibration, repeats_values=repeats_values)  # refuses now what can't be quantised
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


def _texts(plan: QuantizePlan) -> Sequence[str]:
    if plan.calib is None:
        return CALIBRATION_PROMPTS[: plan.calib_limit]
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


def _refuse_useless(given: Mapping[str, object], names: Collection[str], missing: str, expected: str) -> None:
    useless = [name for name in names if given[name] is not None]
    if useless:
        raise RecipeError(
            f"{' and '.join(useless)} without {missing}",
            found=f"no {missing}",
            expected=expected,
            remedy="leave the option out, or choose another way to quantise",
        )


def _fitting(graph: TracedGraph, choices: Collection[int]) -> int:
    """The first of ``choices`` that divides the inputs of every linear layer; if none does, the last."""
    inputs = [
        weight.shape[0] if weight.transpose else weight.shape[1]
        for name, weight in graph.weights.items()
        if len(weight.shape) == 2 and not name.startswith(_FEATURE_PROJECTION)
    ]
    return next((size for size in choices if not any(n % size for n in inputs)), min(choices))


def _bytes(graphs: Mapping[str, TracedGraph]) -> int:
    """Bytes of the weights that a plain step reads."""
    return sum(weight.nbytes for name in ("target", "lm_head") for weight in graphs[name].weights.values())
