"""The fused target against the plain graph that it is made from, over caches that are written in place."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_export import build
from dflash_rt import Bundle, Generator
from dflash_rt.backends import create_backend
from dflash_rt.backends.cpu.backend import OnnxRuntimeBackend
from dflash_rt.backends.device.onnxruntime import OnnxRuntimeEngines
from dflash_rt.errors import BackendError, RequestError
from tests.pairs import TargetSpec, drafter_config, make_drafter, make_target

FUSED = {
    "smollm2": TargetSpec("smollm2", head_dim=16),
    "untied, one key head": TargetSpec("smollm2", head_dim=32, kv_heads=1, tied=False),
    "llama3 rope": TargetSpec("llama3", head_dim=16),
    "biases": TargetSpec("qwen2", heads=2, kv_heads=2),
    "norms before the rotation": TargetSpec("qwen3", head_dim=16),
    "experts": TargetSpec("qwen3_moe", head_dim=16),
}
PLAIN = {
    "a window": (TargetSpec("mistral", head_dim=16, more={"sliding_window": 8}), "fp32"),
    "heads of 8": (TargetSpec("smollm2", head_dim=8), "fp32"),
}
LIMIT, BLOCK = 96, 4

Array = np.ndarray[Any, Any]


def make(folder: Path, spec: TargetSpec, **options: Any) -> Bundle:
    make_target(folder / "target", spec, spread=0.4)
    make_drafter(folder / "drafter", drafter_config(spec, block_size=BLOCK))
    return build(folder / "target", folder / "drafter", folder / "bundle", **options)


@pytest.fixture(scope="module", params=FUSED)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("fused")
    return make(folder, FUSED[request.param], max_seq_len=LIMIT, prefill_chunk=32)


class Target:
    """One form of the target over caches of its own."""

    def __init__(
        self, bundle: Bundle, path: Path | None, capacity: int, seed: int, dtype: str = "f4"
    ) -> None:
        assert path is not None
        self._dtype = dtype
        self._spec = bundle.manifest.graphs["target"]
        self._session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        generator = np.random.default_rng(seed)
        self.caches = {
            tensor.name: generator.normal(size=(1, tensor.shape[1], capacity, tensor.shape[3])).astype(dtype)  # type: ignore[arg-type]
            for tensor in self._spec.inputs
            if "capacity" in tensor.shape
        }

    def run(self, embeddings: Array, start: int) -> dict[str, Array]:
        """Hidden states and features."""
        rows = embeddings.shape[1]
        arrays = {"embeddings": embeddings, "start": np.array([start]), **self.caches}
        for tensor in self._spec.outputs:
            source = self._spec.aliases.get(tensor.name)
            arrays[tensor.name] = (
                np.zeros((1, rows, tensor.shape[2]), self._dtype)  # type: ignore[arg-type]
                if source is None
                else self.caches[source]
            )
        binding = self._session.io_binding()
        for name, bind in (("inputs", binding.bind_input), ("outputs", binding.bind_output)):
            for tensor in getattr(self._spec, name):
                array = arrays[tensor.name]
                bind(tensor.name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        self._session.run_with_iobinding(binding)
        return {name: arrays[name] for name in ("hidden", "features")}


@given(seed=st.integers(0, 2**32 - 1), data=st.data())
@settings(max_examples=25, deadline=None)
def test_passes_are_those_of_the_plain_graph(bundle: Bundle, seed: int, data: st.DataObject) -> None:
    """Some passes in a row, also over rows that an earlier one wrote; caches are full of junk before."""
    capacity = data.draw(st.sampled_from([40, LIMIT + BLOCK]), "capacity")
    width = bundle.manifest.target.hidden_size
    plain = Target(bundle, bundle.graph_path("target"), capacity, seed)
    fused = Target(bundle, bundle.fused_path("target"), capacity, seed)
    generator = np.random.default_rng(seed)
    start = data.draw(st.sampled_from([0, 0, 7, capacity - 12]), "start")
    for _ in range(3):
        rows = data.draw(st.integers(1, min(12, capacity - start)), "rows")
        before = {name: cache.copy() for name, cache in fused.caches.items()}
        embeddings = generator.normal(size=(1, rows, width)).astype("f4")
        wanted, found = plain.run(embeddings, start), fused.run(embeddings, start)
        for name, value in wanted.items():
            assert np.abs(found[name] - value).max() < 2e-5 * max(1.0, np.abs(value).max()), name
        for name, cache in fused.caches.items():
            written = slice(start, start + rows)
            wanted_rows = plain.caches[name][:, :, written]
            error = np.abs(cache[:, :, written] - wanted_rows).max()
            assert error < 2e-5 * max(1.0, np.abs(wanted_rows).max()), name
            cache = cache.copy()  # noqa: PLW2901
            cache[:, :, written] = before[name][:, :, written]
            assert np.array_equal(cache, before[name]), "rows that aren't this pass's"
        start = data.draw(st.integers(max(0, start - 2), min(start + rows, capacity - 1)), "next")


@pytest.mark.parametrize("family", ["smollm2", "qwen3"])
def test_in_16_bits_it_is_for_a_gpu(family: str, tmp_path: Path) -> None:
    """There the host doesn't know how long a sequence is. The CPU's kernels take fp16, too."""
    bundle = make(
        tmp_path, TargetSpec(family, head_dim=16), precision="fp16", max_seq_len=LIMIT, prefill_chunk=32
    )
    assert bundle.fused_path("target") is None
    path = bundle.fused_path("target", on_gpu=True)
    capacity, width = LIMIT + BLOCK, bundle.manifest.target.hidden_size
    plain = Target(bundle, bundle.graph_path("target"), capacity, 1, "f2")
    fused = Target(bundle, path, capacity, 1, "f2")
    generator, start = np.random.default_rng(2), 0
    for rows in (20, 1, 4, BLOCK, 1, 32, 1, 37):  # up to the caches' end
        embeddings = generator.normal(size=(1, rows, width)).astype("f2")
        wanted, found = plain.run(embeddings, start), fused.run(embeddings, start)
        for name, value in wanted.items():
            error = np.abs(found[name].astype("f4") - value.astype("f4")).max()
            assert error < 0.02 * np.abs(value.astype("f4")).max(), name
        start += rows
    assert start == capacity
    assert path is not None
    graph = onnx.load(path, load_external_data=False).graph
    lengths = {node.input[6] for node in graph.node if node.op_type == "GroupQueryAttention"}
    (cast,) = (node for node in graph.node if node.output[0] in lengths)
    sources = {node.output[0]: node for node in graph.node}
    assert sources[sources[cast.input[0]].input[0]].input[0] == "key.0"  # a shape, not a length
    with pytest.raises(BackendError, match="the bundle has no fused target"):
        OnnxRuntimeBackend(bundle, fused=True)


def test_bf16_tables_are_rounded_once(tmp_path: Path) -> None:
    spec = TargetSpec("llama3", head_dim=16)
    exact = make(tmp_path / "fp32", spec, max_seq_len=LIMIT)
    coarse = make(tmp_path / "bf16", spec, precision="bf16", max_seq_len=LIMIT)
    tables = [
        {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
        for path in (exact.fused_path("target"), coarse.fused_path("target", on_gpu=True))
    ]
    for name in ("rotary.cos", "rotary.sin"):
        assert tables[1][name].dtype == "bfloat16"
        assert np.array_equal(tables[0][name].astype(tables[1][name].dtype), tables[1][name])


def watch_loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the target's files that are loaded from now on."""
    real, loaded = ort.InferenceSession, list[str]()

    def watched(path: str, *rest: Any, **options: Any) -> Any:
        name = Path(path).name
        loaded.extend([name] if name.startswith("target") else [])
        return real(path, *rest, **options)

    monkeypatch.setattr(ort, "InferenceSession", watched)
    return loaded


def test_it_runs_on_a_device_where_that_is_asked_for(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop of the GPU backends, over caches that two operators' kernels write in place."""
    answers, loaded = {}, watch_loads(monkeypatch)
    create_backend("onnxruntime-device", bundle).close()
    assert loaded == ["target.onnx"]
    for backend, options in (("onnxruntime", {}), ("onnxruntime-device", {"fused": True})):
        with Generator(
            bundle, backend, num_draft_tokens=BLOCK - 1, backend_options=options, threads=1
        ) as generator:
            answers[backend] = [
                generator.generate(prompt, max_new_tokens=40, stop_token_ids=[]).token_ids
                for prompt in ([1, 2, 3], [5] * 40)
            ]
    assert answers["onnxruntime"] == answers["onnxruntime-device"]
    assert loaded == ["target.onnx", "target.fused.onnx", "target.fused.onnx"]


def test_a_device_refuses_what_it_cannot_run(bundle: Bundle) -> None:
    with pytest.raises(BackendError, match=r"no fused target for a GPU\n.*in fp32"):
        OnnxRuntimeEngines(bundle, cuda=True, fused=True)
    with pytest.raises(RequestError, match="the backend tensorrt has no such option"):
        create_backend("tensorrt", bundle, options={"fused": True})


def test_the_form_of_the_graph(bundle: Bundle) -> None:
    path = bundle.fused_path("target")
    assert path is not None
    assert path.name in bundle.manifest.files
    graph = onnx.load(path, load_external_data=False).graph
    operators = [node.op_type for node in graph.node]
    layers = bundle.manifest.target.num_layers
    assert operators.count("GroupQueryAttention") == layers
    assert operators.count("SkipSimplifiedLayerNormalization") == 2 * layers
    assert not {"Attention", "TensorScatter", "RotaryEmbedding", "Cos", "Transpose"} & set(operators)
    plain = onnx.load(bundle.graph_path("target"), load_external_data=False).graph
    for tensors in ("input", "output"):
        names = [tensor.name for tensor in getattr(graph, tensors)]
        assert names == [tensor.name for tensor in getattr(plain, tensors)]


def test_it_takes_one_sequence_at_a_time(bundle: Bundle) -> None:
    """A limit of ONNX Runtime's operator, which a backend that batches would have to know."""
    width = bundle.manifest.target.hidden_size
    shapes = {t.name: t.shape for t in bundle.manifest.graphs["target"].inputs if "capacity" in t.shape}
    caches = {name: np.zeros((2, heads, 16, size), "f4") for name, (_, heads, _, size) in shapes.items()}
    feeds = {"embeddings": np.ones((2, 3, width), "f4"), "start": np.array([4, 4]), **caches}
    plain = ort.InferenceSession(bundle.graph_path("target"), providers=["CPUExecutionProvider"])
    assert plain.run(["hidden"], feeds)[0].shape == (2, 3, width)
    fused = ort.InferenceSession(bundle.fused_path("target"), providers=["CPUExecutionProvider"])
    with pytest.raises(Exception, match="batch_size must be 1"):
        fused.run(["hidden"], feeds)


def test_a_build_may_leave_it_out(bundle: Bundle, tmp_path: Path) -> None:
    """And is the same otherwise: which one it was is on record."""
    pair = bundle.root.parent
    without = build(
        pair / "target",
        pair / "drafter",
        tmp_path / "bundle",
        max_seq_len=LIMIT,
        prefill_chunk=32,
        fused=False,
    )
    assert without.fused_path("target") is None
    whole, rest = dict(bundle.manifest.files), dict(without.manifest.files)
    assert whole.pop("target.fused.onnx")
    assert rest == whole
    assert (bundle.manifest.provenance.options["fused"], without.manifest.provenance.options["fused"]) == (
        True,
        False,
    )
    assert bundle.manifest.provenance.packages["onnxruntime"] == ort.__version__


def test_the_exporter_is_imported_without_onnxruntime() -> None:
    """In a process of its own, where nothing has imported it before."""
    script = "import sys; sys.modules['onnxruntime'] = None; import dflash_export.exporter"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", PLAIN)
def test_other_targets_have_none(name: str, tmp_path: Path) -> None:
    spec, precision = PLAIN[name]
    bundle = make(tmp_path, spec, precision=precision, max_seq_len=LIMIT)
    # The default of 256 rows a pass isn't more than the longest prompt.
    assert bundle.manifest.limits.prefill_chunk == LIMIT
    assert bundle.fused_path("target") is None
    assert not [name for name in bundle.manifest.files if "fused" in name]
    with pytest.raises(BackendError, match="the bundle has no fused target"):
        OnnxRuntimeBackend(bundle, fused=True)


@pytest.mark.parametrize("quantize", [None, "int4-rtn"])
def test_drafted_is_plain_up_to_the_last_row(tmp_path: Path, quantize: str | None) -> None:
    """The constants of the fused form end where the longest sequence and a block behind it do."""
    spec = TargetSpec("smollm2", head_dim=16, vocab=32, more={"intermediate_size": 64})
    options = {} if quantize is None else {"quantize": quantize, "measure_quantization": False}
    made = make(tmp_path, spec, max_seq_len=LIMIT, prefill_chunk=32, **options)
    assert made.fused_path("target") is not None
    answers = set()
    for width, speculative in ((BLOCK, True), (2, True), (BLOCK, False)):
        with Generator(made, threads=1, num_draft_tokens=width - 1) as generator:
            for prompt in ([1, 2, 3], [5] * (LIMIT - 1)):
                wanted = LIMIT - len(prompt)
                result = generator.generate(
                    prompt, max_new_tokens=wanted, stop_token_ids=[], speculative=speculative
                )
                assert len(result.token_ids) == wanted
                answers.add((len(prompt), result.token_ids))
    assert len(answers) == 2


def test_the_backend_runs_it_unless_told_otherwise(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = watch_loads(monkeypatch)
    files = {None: "target.fused.onnx", True: "target.fused.onnx", False: "target.onnx"}
    for choice, file in files.items():
        loaded.clear()
        backend = create_backend("onnxruntime", bundle, options={} if choice is None else {"fused": choice})
        assert loaded == [file]
        assert backend.name == ("onnxruntime-unfused" if choice is False else "onnxruntime")
        backend.close()
