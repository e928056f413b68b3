"""Calibrated targets: AWQ, SmoothQuant and FP8, their graphs, their engines, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from click.testing import CliRunner

from dflash_export import build, compile_engines, verify
from dflash_export.cli import main
from dflash_export.engines.devices import check_fp8
from dflash_export.errors import EngineBuildError, RecipeError, VerifyError
from dflash_export.graphs.graph import WeightFormat
from dflash_export.parity.replay import Replay
from dflash_export.quantize.calibration import CALIBRATION_FILE, Calibration, LayerCalibration, folding
from dflash_export.quantize.dequantized import put_dequantized
from dflash_export.quantize.formats import dequantize, quantize, round_activations
from dflash_export.recipe import read_recipe
from dflash_export.reference import load_target, teacher_forced
from dflash_export.sources.resolve import resolve_target
from dflash_rt import Bundle
from tests.export.engines.built import check_handed, watch_builds
from tests.marks import slow_but
from tests.pairs import TargetSpec, drafter_config, make_drafter, make_target

pytest.importorskip("modelopt", reason="targets are calibrated: pip install 'dflash-export[quantize]'")

NO_TENSORRT = "engines are built: pip install 'dflash-export[tensorrt-rtx]'"
ROOT = Path(__file__).parents[3]
# qwen2 has biases on q, k and v; in mistral's no value head is shared, so that v_proj can take factors.
FAMILIES = ("qwen2", "qwen3", "smollm2", "llama3", "mistral")
SCHEMES = ("int4", "int8", "fp8")
PROMPT, NEW = [3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5, 8, 9, 7]

MakeBundle = Callable[[str, str, str], Bundle]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> MakeBundle:
    """Bundles by family, scheme and precision, each made once; ``targets`` lie beside them."""
    made: dict[tuple[str, str, str], Bundle] = {}
    root = tmp_path_factory.mktemp("calibrated")

    def bundle(family: str, scheme: str, precision: str = "fp32") -> Bundle:
        key = family, scheme, precision
        if key not in made:
            target, drafter = root / f"{family}-target", root / f"{family}-drafter"
            if not target.exists():
                spec = TargetSpec(
                    family,
                    tied=False,
                    vocab=40,
                    hidden=64,
                    head_dim=16,
                    kv_heads=4 if family == "mistral" else 2,
                    layers=2,
                    more={"intermediate_size": 96},
                )
                make_target(target, spec)
                make_drafter(drafter, drafter_config(spec, head_dim=16, intermediate_size=96))
            made[key] = build(
                target,
                drafter,
                root / "-".join(key),
                quantize=scheme,
                precision=precision,
                quantize_head="int4" if scheme == "int4" else "int8",
                quantize_drafter=True,
                measure_quantization=False,
                max_seq_len=60,
                prefill_chunk=16,
            )
        return made[key]

    return bundle


def target_of(bundle: Bundle, family: str) -> Path:
    return bundle.root.parent / f"{family}-target"


# --- Numbers ---


@pytest.mark.parametrize(
    ("family", "scheme"),
    slow_but(
        product(["qwen2", "mistral"], SCHEMES), ("qwen2", "int4"), ("mistral", "int8"), ("qwen2", "fp8")
    ),
)
def test_graphs_compute_what_pytorch_rounds(bundles: MakeBundle, family: str, scheme: str) -> None:
    """ONNX Runtime against fake quantisation in PyTorch: within 1e-4 of the logits' spread.

    What PyTorch does is built here from the checkpoint and the calibration, without reading a graph.
    Quantising itself moves logits by more than a hundred times that.
    """
    bundle = bundles(family, scheme, "fp32")
    wanted = teacher_forced(fake_quantised(bundle, family), PROMPT, NEW).logits
    found = np.concatenate([item.logits for item in Replay(bundle, threads=1).passes(PROMPT, NEW, 4)])
    assert np.abs(found - wanted).max() < 1e-4 * wanted.std()
    model = load_target(resolve_target(target_of(bundle, family)))
    before = teacher_forced(model, PROMPT, NEW).logits
    assert np.abs(before - wanted).max() > 1e-2 * wanted.std()


def fake_quantised(bundle: Bundle, family: str) -> Any:
    """``round(x / m) · round(W m)`` in every linear layer; no factor is folded into anything."""
    info = bundle.manifest.quantization
    assert info is not None
    model = load_target(resolve_target(target_of(bundle, family)))
    form = WeightFormat(info.weights, info.block_size)
    for name, layer in Calibration.load(bundle.root / CALIBRATION_FILE).layers.items():
        owner, _, joined = name.removesuffix(".weight").rpartition(".")
        for part in joined.split("+"):
            module = model.get_submodule(f"{owner}.{part}".replace("decoder.", "model.", 1))
            ones = torch.ones(module.in_features)
            multiplier = ones if layer.multiplier is None else layer.multiplier
            codes, scales = quantize(
                module.weight.detach() * multiplier, form, torch.float32, layer.rounding_cost
            )
            module.weight = torch.nn.Parameter(dequantize(codes.t(), scales.t()).T.contiguous())
            module.register_forward_pre_hook(_rounding(multiplier, layer.largest, info.activations))
    codes, scales = quantize(model.lm_head.weight.detach(), WeightFormat(info.head, 32), torch.float32)
    model.lm_head.weight = torch.nn.Parameter(dequantize(codes.t(), scales.t()).T.contiguous())
    return model


def _rounding(multiplier: torch.Tensor, largest: float | None, kind: Any) -> Any:
    def treat(_: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        values = inputs[0] / multiplier
        if kind is None:
            return (values,)
        assert largest is not None
        top = {"int8": 127.0, "fp8": 448.0}[kind]
        return (round_activations(values, float(np.float32(largest / top)), kind),)

    return treat


@pytest.mark.parametrize("scheme", slow_but(SCHEMES, "int4"))
def test_verify_judges_graphs_and_loop(bundles: MakeBundle, scheme: str) -> None:
    bundle = bundles("qwen2", scheme, "fp32")
    sources = {"target": target_of(bundle, "qwen2"), "drafter": bundle.root.parent / "qwen2-drafter"}
    report = verify(bundle, prompts=[PROMPT, [7]], max_new_tokens=12, **sources, write_report=False)
    assert report.ok, str(report)


def test_verify_wants_the_calibrated_codes(bundles: MakeBundle) -> None:
    """Codes of another calibration aren't this checkpoint's."""
    bundle = bundles("qwen2", "int4", "fp32")
    path = bundle.root / CALIBRATION_FILE
    right = path.read_bytes()
    layers = dict(Calibration.load(path).layers)
    name = next(iter(layers))
    layer = layers[name]
    assert layer.multiplier is not None
    shifted = torch.cat([layer.multiplier[1:], layer.multiplier[:1]])
    layers[name] = LayerCalibration(layer.importance, shifted, layer.largest)
    model = load_target(resolve_target(target_of(bundle, "qwen2")))
    info = bundle.manifest.quantization
    assert info is not None
    try:
        path.unlink()
        Calibration(layers).save(path)
        with pytest.raises(VerifyError, match="isn't the checkpoint's, quantised"):
            put_dequantized(model, bundle.root, info, check=True)
    finally:
        path.write_bytes(right)


def test_awq_is_nearer_than_rounding(bundles: MakeBundle) -> None:
    """Over the inputs that a layer really gets: the squared error that is left, of both."""
    bundle = bundles("smollm2", "int4", "fp32")
    model = load_target(resolve_target(target_of(bundle, "smollm2")))
    layers = Calibration.load(bundle.root / CALIBRATION_FILE).layers
    form, errors = WeightFormat("int4", 32), {True: 0.0, False: 0.0}
    for name, layer in layers.items():
        owner, _, joined = name.removesuffix(".weight").rpartition(".")
        parts = [f"{owner}.{part}.weight".replace("decoder.", "model.", 1) for part in joined.split("+")]
        matrix = torch.cat([model.get_parameter(part).detach() for part in parts])
        assert layer.multiplier is not None
        for calibrated in (True, False):
            factor = layer.multiplier if calibrated else torch.ones(matrix.shape[1])
            cost = layer.rounding_cost if calibrated else None
            codes, scales = quantize(matrix * factor, form, torch.float32, cost)
            error = dequantize(codes.t(), scales.t()).T / factor - matrix
            errors[calibrated] += float((error.square() * layer.importance).sum())
    assert errors[True] < 0.95 * errors[False]


# --- Where factors go ---


def test_factors_are_folded_where_that_is_exact() -> None:
    two, three = torch.full((4,), 2.0), torch.full((4,), 3.0)
    layers = {
        "decoder.layers.0.self_attn.q_proj+k_proj+v_proj.weight": LayerCalibration(two, two, None),
        "decoder.layers.0.self_attn.o_proj.weight": LayerCalibration(two, three, None),
        "decoder.layers.0.mlp.down_proj.weight": LayerCalibration(two, three, None),
    }
    shared = folding(Calibration(layers), repeats_values=True)
    assert shared.divided == {"decoder.layers.0.self_attn.o_proj.weight"}
    assert "decoder.layers.0.self_attn.v_proj.weight" not in shared.rows
    alone = folding(Calibration(layers), repeats_values=False)
    assert alone.divided == set()
    ones = torch.ones(4, 4)
    value = alone.apply("decoder.layers.0.self_attn.v_proj.weight", ones)
    assert torch.allclose(value, torch.full((4, 4), 2 / 3))
    assert torch.equal(
        alone.apply("decoder.layers.0.input_layernorm.weight", torch.ones(4)), torch.full((4,), 0.5)
    )
    assert torch.allclose(alone.apply("decoder.layers.0.mlp.up_proj.weight", ones), torch.full((4, 4), 1 / 3))


@pytest.mark.parametrize(("family", "products"), [("qwen2", 2), ("mistral", 0)])
def test_one_product_is_left_for_shared_values(bundles: MakeBundle, family: str, products: int) -> None:
    graph = ir.load(bundles(family, "int4", "fp32").graph_path("target")).graph
    assert len([name for name in graph.initializers if name.endswith(".divisor")]) == products


def test_what_stays_unquantised(bundles: MakeBundle) -> None:
    bundle = bundles("qwen2", "int8", "fp32")
    info = bundle.manifest.quantization
    assert info is not None
    assert (info.weights, info.activations, info.method, info.block_size) == (
        "int8",
        "int8",
        "smoothquant",
        None,
    )
    assert (info.head, info.drafter) == ("int8", "int8")
    assert info.calibration is not None
    assert info.calibration.prompts == 8
    for graph, products in (("draft", 2 * 4), ("inject", 1)):
        loaded = ir.load(bundle.graph_path(graph)).graph
        weights = [node.inputs[1] for node in loaded if node.op_type == "MatMul"]
        plain = [value.name for value in weights if value is not None and value.producer() is None]
        assert plain == (["drafter.fc.weight"] if graph == "inject" else [])
        assert len(weights) - len(plain) == products
    assert CALIBRATION_FILE in bundle.manifest.files


# --- Engines ---

# Each scheme once; bundles that other tests here make, too.
FAST = [("qwen2", "int4"), ("mistral", "int8"), ("qwen3", "fp8")]


@pytest.mark.parametrize(("family", "scheme"), slow_but(product(FAMILIES, SCHEMES), *FAST))
def test_every_graph_is_built(bundles: MakeBundle, family: str, scheme: str) -> None:
    """Parsed and built with TensorRT-RTX; no engine is run. Half of the families in bf16."""
    trt = pytest.importorskip("tensorrt_rtx", reason=NO_TENSORRT)
    bundle = bundles(family, scheme, "bf16" if family in ("qwen2", "mistral") else "fp16")
    with watch_builds(trt) as builds:
        result = compile_engines(bundle, backend="tensorrt-rtx")
    assert result.built == tuple(bundle.manifest.graphs)
    wanted = (89, 120, 121) if scheme == "fp8" else (80, 86, 89, 120, 121)
    assert result.engines.build.compute_capabilities == wanted
    for graph, handed in zip(result.built, builds, strict=True):
        check_handed(handed, bundle, graph, capacity=64, chunk=16, block=4, sms=wanted)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "scheme"),
    [("fp16", None), ("bf16", None), ("fp16", "int8"), ("bf16", "int4"), ("bf16", "fp8")],
)
def test_every_graph_of_the_demo_pair_is_built(tmp_path: Path, precision: str, scheme: str | None) -> None:
    """In 16 bits and quantised; fp32 is test_engines.py's. The numbers are of no use after so little text."""
    trt = pytest.importorskip("tensorrt_rtx", reason=NO_TENSORRT)
    few = {"calib_limit": 2, "calib_tokens": 4, "measure_quantization": False, "quantize_head": "int8"}
    sources = read_recipe(ROOT / "engines" / "smollm2-135m.yaml")
    options = {} if scheme is None else {"quantize": scheme, **few}
    bundle = build(sources["target"], sources["drafter"], tmp_path / "bundle", precision=precision, **options)
    with watch_builds(trt) as builds:
        result = compile_engines(bundle, backend="tensorrt-rtx", max_seq_len=1016, compute_capabilities=(89,))
    assert result.built == tuple(bundle.manifest.graphs)
    for graph, handed in zip(result.built, builds, strict=True):
        check_handed(handed, bundle, graph, capacity=1024, chunk=256, block=8, sms=(89,))


def test_fp8_is_refused_where_there_is_none(bundles: MakeBundle) -> None:
    pytest.importorskip("tensorrt_rtx", reason="options of a real library are checked")
    bundle = bundles("qwen3", "fp8", "fp16")
    with pytest.raises(EngineBuildError, match=r"(?s)sm86 has no FP8.*8\.6.*--int8 or --int4"):
        compile_engines(bundle, backend="tensorrt-rtx", compute_capabilities=(86, 89))
    with pytest.raises(EngineBuildError, match="Jetson Orin"):
        check_fp8("Jetson Orin", 87)
    check_fp8("Ada", 89)


# --- Options ---


def test_prompts_of_a_file(bundles: MakeBundle, tmp_path: Path) -> None:
    """Two of three prompts, few tokens; the manifest and `inspect` say so."""
    target = target_of(bundles("qwen3", "fp8", "fp32"), "qwen3")
    (tmp_path / "prompts.txt").write_text("one\n\ntwo\nthree\n")
    sources = ["--target", str(target), "--drafter", str(target.parent / "qwen3-drafter")]
    calib = ["--calib", str(tmp_path / "prompts.txt"), "--calib-limit", "2", "--calib-tokens", "5"]
    runner, output = CliRunner(), tmp_path / "bundle"
    arguments = ["build", *sources, *calib, "--fp8", "--no-measure-quantization", "-o", str(output)]
    result = runner.invoke(main, arguments)
    assert result.exit_code == 0, result.output
    info = Bundle.open(output).manifest.quantization
    assert info is not None
    assert info.calibration is not None
    assert (info.calibration.prompts, info.calibration.tokens) == (2, 2 * (16 + 5))
    shown = runner.invoke(main, ["inspect", str(output)]).output
    assert "fp8 with a scale for each output, activations fp8, max" in shown
    assert "calibrated on 42 tokens of its own answers to 2 prompts" in shown
    options = json.loads((output / "manifest.json").read_text())["provenance"]["options"]
    assert (options["calib"], options["calib_limit"], options["calib_tokens"]) == ("prompts.txt", 2, 5)


def test_without_modelopt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "modelopt.torch.quantization", None)
    with pytest.raises(RecipeError, match=r"(?s)nvidia-modelopt.*--int8-weight-only"):
        build(tmp_path / "t", tmp_path / "d", tmp_path / "bundle", quantize="int4")
