"""Quantised bundles: the numbers, the graphs, what ONNX Runtime makes of them, and what is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_bench.run.measure import run_bench
from dflash_bench.run.report import render as render_bench
from dflash_export import build, verify
from dflash_export.cli import main
from dflash_export.errors import RecipeError, UnsupportedModelError, VerifyError
from dflash_export.graphs.graph import WeightFormat
from dflash_export.parity.replay import Replay
from dflash_export.parity.table import render
from dflash_export.quantize.formats import dequantize, pack_int4, quantize
from dflash_export.recipe import read_recipe
from dflash_export.reference import teacher_forced
from dflash_rt import Bundle, Generator
from dflash_rt.backends import create_backend
from dflash_rt.backends.cpu.backend import OnnxRuntimeBackend
from dflash_rt.bundle.manifest import MANIFEST_NAME
from dflash_rt.errors import BackendError, RequestError
from tests.pairs import TargetSpec, drafter_config, make_drafter, make_target

ROOT = Path(__file__).parents[3]
# Biases on q, k and v (qwen2), a head of its own: every kind of weight is there.
SPEC = TargetSpec("qwen2", tied=False, vocab=40, hidden=64, layers=2, more={"intermediate_size": 96})
PROMPT, NEW = [3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5, 8, 9, 7]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pair")
    make_target(root / "target", SPEC)
    make_drafter(root / "drafter", drafter_config(SPEC))
    return root


def make(pair: Path, output: Path, **options: Any) -> Bundle:
    return build(pair / "target", pair / "drafter", output, measure_quantization=False, **options)


@pytest.fixture(
    scope="module",
    params=[("int4-rtn", True), ("int8-weight-only", "int8"), ("int4-rtn", "int4")],
    ids=lambda pair: f"{pair[0]}, head {pair[1]}",
)
def bundle(request: pytest.FixtureRequest, pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    weights, head = request.param
    return make(pair, tmp_path_factory.mktemp("b") / "b", quantize=weights, quantize_head=head)


@given(
    seed=st.integers(0, 1000),
    form=st.builds(WeightFormat, st.sampled_from(["int4", "int8"]), st.sampled_from([16, 32])),
    scale_dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    size=st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 300.0]),
)
@settings(max_examples=40, deadline=None)
def test_rounding(seed: int, form: WeightFormat, scale_dtype: torch.dtype, size: float) -> None:
    """Codes fit their type, scales are positive, and no block is worse than by the plain rule."""
    generator = torch.Generator().manual_seed(seed)
    matrix = size * torch.randn(3, 64, generator=generator)
    codes, scales = quantize(matrix, form, scale_dtype)
    assert codes.dtype == torch.int8
    assert scales.dtype == scale_dtype
    assert (scales > 0).all()
    top = 2 ** (form.bits - 1) - 1
    assert -top - 1 <= codes.min() <= codes.max() <= top
    found = dequantize(codes.T, scales.T).T
    blocks = matrix.view(3, -1, form.block_size)
    step = (blocks.abs().amax(-1, keepdim=True) / top).to(scale_dtype).float()
    step = torch.where(step > 0, step, 1.0)
    plain = (blocks / step).round().clamp(-top - 1, top) * step
    error = (found.view_as(blocks) - blocks).square().sum(-1)
    assert (error <= (plain - blocks).square().sum(-1) * 1.0001 + 1e-30).all()


@given(st.lists(st.integers(-8, 7), min_size=1, max_size=9).map(lambda half: half + half[::-1]))
@settings(max_examples=30, deadline=None)
def test_int4_is_packed_as_onnx_unpacks_it(codes: list[int]) -> None:
    packed = pack_int4(torch.tensor(codes, dtype=torch.int8)).numpy().tobytes()
    tensor = onnx.helper.make_tensor("codes", onnx.TensorProto.INT4, [len(codes)], packed, raw=True)
    assert onnx.numpy_helper.to_array(tensor).astype(int).tolist() == codes


def test_the_search_beats_plain_rounding() -> None:
    matrix = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    codes, scales = quantize(matrix, WeightFormat("int4", 32), torch.float32)
    step = matrix.view(64, -1, 32).abs().amax(-1) / 7
    plain = (matrix.view(64, -1, 32) / step[..., None]).round() * step[..., None]
    error = (dequantize(codes.T, scales.T).T - matrix).norm()
    assert error < 0.93 * (plain.view_as(matrix) - matrix).norm()


def test_what_is_quantised_and_what_is_not(pair: Path, bundle: Bundle, tmp_path: Path) -> None:
    info = bundle.manifest.quantization
    assert info is not None
    asked = bundle.manifest.provenance.options["quantize_head"]
    assert (info.head, asked) in [("int8", True), ("int8", "int8"), ("int4", "int4")]
    assert (info.block_size, info.method, info.cost) == (32, "rtn", None)
    assert info.calibration is info.activations is info.drafter is None
    for graph, weights in (("target", info.weights), ("lm_head", info.head)):
        model = ir.load(bundle.graph_path(graph))
        assert set(model.opset_imports) == {""}
        products = [node for node in model.graph if node.op_type in ("MatMul", "Gemm")]
        assert len(products) == {"target": 4 * SPEC.layers, "lm_head": 1}[graph]
        for node in products:
            producer = node.inputs[1].producer()  # type: ignore[union-attr]
            assert producer is not None
            assert producer.op_type == "DequantizeLinear"
            assert producer.attributes["axis"].as_int() == 0
            assert producer.attributes["block_size"].as_int() == 32
            codes, scales = producer.inputs
            assert codes is not None
            assert scales is not None
            assert codes.dtype == {"int4": ir.DataType.INT4, "int8": ir.DataType.INT8}[weights]
            assert scales.shape == (codes.shape[0] // 32, codes.shape[1])  # type: ignore[index,operator]
        left = [v for v in model.graph.initializers.values() if v.dtype == ir.DataType.FLOAT]
        assert all(v.name.endswith(".scales") or len(v.shape) < 2 for v in left)  # type: ignore[union-attr,arg-type]
    assert info.bytes == sum(
        (bundle.root / f"{name}.data").stat().st_size for name in ("target", "lm_head")
    ) - (_gaps(bundle, "target") + _gaps(bundle, "lm_head"))
    plain = make_plain(pair, tmp_path / "plain")
    assert info.bytes < info.bytes_before / (3 if info.weights == "int4" else 2)
    for name in ("embed.onnx", "embedding.data", "inject.onnx", "draft.onnx", "drafter.data"):
        assert bundle.manifest.files[name] == plain.manifest.files[name], name


def make_plain(pair: Path, output: Path) -> Bundle:
    return build(pair / "target", pair / "drafter", output)


def _gaps(bundle: Bundle, graph: str) -> int:
    """Bytes of a data file between its tensors."""
    tensors = [v.const_value for v in ir.load(bundle.graph_path(graph)).graph.initializers.values()]
    used = sum(t.length for t in tensors if isinstance(t, ir.ExternalTensor) and t.length is not None)
    return (bundle.root / f"{graph}.data").stat().st_size - used


def fake_quantised(pair: Path, bundle: Bundle) -> Any:
    """The checkpoint in PyTorch with every linear layer rounded, from its own weights and nothing stored."""
    from transformers import AutoModelForCausalLM

    info = bundle.manifest.quantization
    assert info is not None
    model = AutoModelForCausalLM.from_pretrained(pair / "target", dtype=torch.float32).eval()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            weights = info.head if name == "lm_head" else info.weights
            assert weights is not None
            form = WeightFormat(weights, info.block_size)
            codes, scales = quantize(module.weight.detach(), form, torch.float32)
            module.weight = torch.nn.Parameter(dequantize(codes.T, scales.T).T)
    return model


def test_graphs_compute_what_pytorch_computes_with_rounded_weights(pair: Path, bundle: Bundle) -> None:
    """With float activations to rounding: 1e-5 of the spread. That is a thousandth of what int8 costs."""
    wanted = teacher_forced(fake_quantised(pair, bundle), PROMPT, NEW).logits
    for width in (1, 4):
        found = np.concatenate([item.logits for item in Replay(bundle, threads=1).passes(PROMPT, NEW, width)])
        assert np.abs(found - wanted).max() < 1e-5 * wanted.std()
    unquantised = teacher_forced(_checkpoint(pair), PROMPT, NEW).logits
    assert np.abs(unquantised - wanted).max() > 1e-3 * wanted.std()


def _checkpoint(pair: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(pair / "target", dtype=torch.float32).eval()


def test_the_cpu_backend_reads_the_codes(pair: Path, bundle: Bundle, tmp_path: Path) -> None:
    """Every product becomes MatMulNBits; its int8 activations cost less than a fifth of the spread here."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3  # it warns that such a file fits one machine only
    ort.InferenceSession(bundle.graph_path("target"), options, providers=["CPUExecutionProvider"])
    operators = [
        node.op_type for node in onnx.load(tmp_path / "optimised.onnx", load_external_data=False).graph.node
    ]
    assert operators.count("MatMulNBits") == 4 * SPEC.layers
    assert "DequantizeLinear" not in operators

    wanted = teacher_forced(fake_quantised(pair, bundle), PROMPT, NEW[:1]).logits
    errors = {}
    for integers in (True, False):
        with Generator(
            bundle, OnnxRuntimeBackend(bundle, threads=1, integer_activations=integers)
        ) as generator:
            generator.generate(PROMPT, max_new_tokens=1)
            found = generator._backend.logits()[0, 0]  # type: ignore[attr-defined]
        errors[integers] = float(np.abs(found - wanted[0]).max() / wanted.std())
    assert errors[False] < 1e-5 < errors[True] < 0.2


def _step_logits(backend: OnnxRuntimeBackend, width: int) -> np.ndarray[Any, Any]:
    """float32 ``[rows, vocab]`` of NEW, fed in steps of ``width`` after a longer prompt."""
    backend.clear()
    prompt = list(range(3, 40)) * 2
    backend.reserve(len(prompt) + len(NEW))
    backend.prefill(np.array([prompt]), np.array([0]), inject=True)
    found = []
    for begin in range(0, 8, width):
        rows, start = np.array([NEW[begin : begin + width]]), np.array([len(prompt) + begin])
        backend._target(rows, start)
        backend._head(backend._buffers["hidden"].view(1, width))
        found.append(backend.logits()[0].copy())
    return np.concatenate(found)


@pytest.mark.parametrize("weights", ["int4-rtn", "int8-weight-only"])
def test_a_row_gives_the_same_however_many_rows_there_are(tmp_path: Path, weights: str) -> None:
    """With activations rounded to 8 bits: the same but for rounding of fp32. Alone, a row is 1 % off here."""
    spec = TargetSpec("qwen2", vocab=40, hidden=256, layers=4, more={"intermediate_size": 256})
    make_target(tmp_path / "target", spec)
    make_drafter(tmp_path / "drafter", drafter_config(spec))
    bundle = make(tmp_path, tmp_path / "bundle", quantize=weights, quantize_head=True)
    backend = OnnxRuntimeBackend(bundle, threads=1)
    wanted = _step_logits(backend, 4)
    for width in (1, 2):
        assert np.abs(_step_logits(backend, width) - wanted).max() < 1e-5 * wanted.std()
    backend.close()
    fast = OnnxRuntimeBackend(bundle, threads=1, fast_plain=True)
    assert fast.name == "onnxruntime-fast-plain"
    np.testing.assert_array_equal(_step_logits(fast, 4), wanted)  # only one row alone is another matter
    assert np.abs(_step_logits(fast, 1) - wanted).max() < 0.2 * wanted.std()
    assert ("target", 1, 1) in {(run.graph, batch, run.rows) for run, batch in fast._bindings}
    fast.close()


def test_drafted_tokens_are_plain_tokens(bundle: Bundle) -> None:
    with Generator(bundle, threads=1, num_draft_tokens=3) as generator:
        for prompt in (PROMPT, [7], NEW):
            answers = [
                generator.generate(prompt, max_new_tokens=150, stop_token_ids=[], speculative=speculative)
                for speculative in (True, False)
            ]
            assert answers[0].token_ids == answers[1].token_ids


def test_drafted_tokens_of_the_demo_pair_are_plain_tokens(tmp_path: Path) -> None:
    recipe = read_recipe(ROOT / "engines" / "smollm2-135m.yaml")
    sources = {"target": recipe["target"], "drafter": recipe["drafter"]}
    made = build(
        **sources, output=tmp_path / "b", quantize="int4-rtn", quantize_head=True, measure_quantization=False
    )
    chat = [{"role": "user", "content": "Why do cats purr when you pet them?"}]
    with Generator(made, threads=2, num_draft_tokens="auto") as generator:
        plain = generator.generate(chat, max_new_tokens=48, speculative=False)
        adaptive = generator.generate(chat, max_new_tokens=48)
    with Generator(made, threads=2, num_draft_tokens=3) as generator:
        drafted = generator.generate(chat, max_new_tokens=48)
    assert drafted.token_ids == plain.token_ids == adaptive.token_ids
    assert drafted.stats.tokens_per_step > 1.1


def test_fast_plain_is_refused_where_it_changes_nothing(pair: Path, bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"(?s)fast_plain changes nothing.*float activations"):
        OnnxRuntimeBackend(bundle, integer_activations=False, fast_plain=True)
    with pytest.raises(BackendError, match=r"(?s)fast_plain changes nothing.*isn't quantised"):
        create_backend("onnxruntime", make_plain(pair, tmp_path / "plain"), options={"fast_plain": True})
    create_backend("onnxruntime", bundle, threads=1, options={"fast_plain": True}).close()
    with pytest.raises(RequestError, match="fast_plain is wrong"):
        create_backend("onnxruntime", bundle, options={"fast_plain": 1})


def test_bench_with_the_bundle_that_is_not_quantised_as_baseline(
    pair: Path, bundle: Bundle, tmp_path: Path
) -> None:
    plain = make_plain(pair, tmp_path / "plain")
    report = run_bench(
        bundle,
        prompts=[PROMPT],
        baseline=plain.root,
        max_new_tokens=12,
        repeats=1,
        num_draft_tokens=(1,),
        threads=1,
    )
    assert list(report.outcomes) == ["plain", "drafted-1", "baseline-plain", "baseline-drafted-1"]
    assert report.drafted == ("drafted-1",)
    with Generator(plain, threads=1) as generator:
        answer = generator.generate(PROMPT, max_new_tokens=12).token_ids
    assert {
        o.token_ids for n in ("baseline-plain", "baseline-drafted-1") for o in report.outcomes[n].values()
    } == {answer}
    info = bundle.manifest.quantization
    assert info is not None
    assert f"(fp32, {info.weights} in blocks of 32, head {info.head}) on" in render_bench(report)
    assert "baseline: plain (fp32)" in render_bench(report)
    assert report.to_dict()["ratios"]["plain"]["baseline-plain"]["pairs"] == 1


def test_bench_refuses_a_baseline_with_another_vocabulary(bundle: Bundle, tmp_path: Path) -> None:
    spec = replace(SPEC, vocab=48)
    make_target(tmp_path / "target", spec)
    make_drafter(tmp_path / "drafter", drafter_config(spec))
    other = make_plain(tmp_path, tmp_path / "bundle")
    with pytest.raises(RequestError, match="another vocabulary"):
        run_bench(bundle, prompts=[PROMPT], baseline=other, max_new_tokens=4)


def test_verify_judges_graphs_and_loop(pair: Path, bundle: Bundle) -> None:
    report = verify(bundle, prompts=[PROMPT, [7]], max_new_tokens=12, **_sources(pair), write_report=False)
    assert report.ok, str(report)
    info = bundle.manifest.quantization
    assert info is not None
    assert report.bundle["quantization"] == info.weights
    assert f"{info.weights}, dequantised in PyTorch" in render(report)


def _sources(pair: Path) -> dict[str, Any]:
    return {"target": pair / "target", "drafter": pair / "drafter"}


@pytest.mark.parametrize("graph", ["target", "lm_head"])
def test_verify_sees_one_wrong_code(pair: Path, tmp_path: Path, graph: str) -> None:
    made = make(pair, tmp_path / "bundle", quantize="int4-rtn", quantize_head=True)
    (name,) = [v for v in ir.load(made.graph_path(graph)).graph.initializers if v.endswith("codes")][:1]
    tensor = ir.load(made.graph_path(graph)).graph.initializers[name].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    assert tensor.offset is not None
    path = made.root / f"{graph}.data"
    data = bytearray(path.read_bytes())
    data[tensor.offset + 5] ^= 2  # two steps, up or down
    path.write_bytes(data)
    document = json.loads((made.root / MANIFEST_NAME).read_text())
    document["files"][path.name]["sha256"] = hashlib.sha256(data).hexdigest()
    (made.root / MANIFEST_NAME).write_text(json.dumps(document))
    with pytest.raises(VerifyError, match=r"(?s)isn't the checkpoint's, quantised.*1 of \d+ outputs"):
        verify(
            made.root,
            prompts=[PROMPT],
            max_new_tokens=4,
            **_sources(pair),
            reference=False,
            write_report=False,
        )


def test_the_cost_is_measured_and_shown(pair: Path, tmp_path: Path) -> None:
    runner, output = CliRunner(), tmp_path / "bundle"
    sources = ["--target", str(pair / "target"), "--drafter", str(pair / "drafter"), "-o", str(output)]
    result = runner.invoke(
        main,
        ["build", *sources, "--int8-weight-only", "--quantize-block", "16", "--measure-tokens", "24"],
    )
    assert result.exit_code == 0, result.output
    info = Bundle.open(output).manifest.quantization
    assert info is not None
    assert info.block_size == 16
    assert info.cost is not None
    assert info.cost.tokens == 8 * 24
    assert 0.8 < info.cost.top1_agreement < 1
    assert 0 < info.cost.kl_divergence < 0.1
    assert info.cost.tokens_per_step is not None
    assert info.cost.tokens_per_step_before is not None
    for text in (result.output, runner.invoke(main, ["inspect", str(output)]).output):
        assert f"best token the same in {info.cost.top1_agreement:.1%}" in text
        assert "int8 in blocks of 16, rtn" in text


def test_a_mixture_of_experts_is_refused(tmp_path: Path) -> None:
    spec = TargetSpec("qwen3_moe", layers=2)
    make_target(tmp_path / "target", spec)
    make_drafter(tmp_path / "drafter", drafter_config(spec))
    with pytest.raises(UnsupportedModelError, match="experts"):
        make(tmp_path, tmp_path / "bundle", quantize="int4-rtn")
    assert not (tmp_path / "bundle").exists()


def test_a_block_that_does_not_fit_is_refused(pair: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"blocks of 64[^$]*--quantize-block 16 or 32"):
        make(pair, tmp_path / "bundle", quantize="int4-rtn", quantize_block=64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int3"}, "int8-weight-only, fp8"),
        ({"quantize": "int4-rtn", "quantize_block": 48}, "16, 32, 64, 128, 256"),
        ({"quantize": "int4-rtn", "quantize_head": 1}, r"true or false or int8, int4"),
        ({"quantize": "int4-rtn", "quantize_head": "fp8"}, r"true or false or int8, int4"),
        ({"quantize_head": True}, "quantize_head and measure_quantization without quantize"),
        ({"quantize": "int4-rtn", "measure_tokens": 9}, "measure_tokens without a measurement"),
        ({"quantize": "int4-rtn", "calib_tokens": 3}, "calib_tokens without calibration"),
        ({"quantize": "int8", "quantize_block": 32}, "quantize_block without blocks"),
        ({"quantize": "fp8", "calib": ""}, "expected: a path"),
    ],
)
def test_options_that_are_wrong(pair: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make(pair, tmp_path / "bundle", **options)


def test_a_drafter_with_convolutions_is_refused_if_asked(pair: Path, tmp_path: Path) -> None:
    """The weights of a DFlash 2 drafter aren't all linear layers. The target alone is quantised."""
    dflash2 = {"conv_kernel_size": 2, "conv_group_size": 16, "selector_rank": 8, "selector_top_k": 3}
    spec = TargetSpec("qwen2", tied=False, vocab=40, hidden=64, layers=2, more={"intermediate_size": 96})
    raw = drafter_config(spec, architectures=["DFlash2DraftModel"], dflash_config=dflash2)
    make_drafter(tmp_path / "drafter", raw)
    options = {"quantize": "int8-weight-only", "quantize_drafter": True, "measure_quantization": False}
    with pytest.raises(UnsupportedModelError, match=r"(?s)convolutions.*leave --quantize-drafter out"):
        build(pair / "target", tmp_path / "drafter", tmp_path / "bundle", **options)
