"""Graphs that TensorRT builds without a word into something else: each is refused for its own reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from dflash_export.engines.builder import BuildMonitor, EngineJob, Prepared, build_engine, prepare
from dflash_export.engines.network import Network, load_header
from dflash_export.engines.vendor import Vendor, load_vendor
from dflash_export.errors import EngineBuildError
from dflash_export.progress import SILENT
from dflash_rt.bundle.engine_sets import AxisRange, BuildKey, ProfileSpec
from dflash_rt.bundle.manifest import GraphSpec, TensorSpec

pytest.importorskip("tensorrt_rtx", reason="engines are built: pip install 'dflash-export[tensorrt-rtx]'")

_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_ONNX = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


@pytest.fixture(scope="module")
def vendor() -> Vendor:
    return load_vendor("tensorrt-rtx")


@dataclass
class Case:
    """One attention over one pair of caches, as lists that a test may spoil before it builds the graph."""

    precision: str = "fp16"
    head_dim: int = 64
    inputs: dict[str, tuple[int, list[str | int]]] = field(default_factory=dict)
    outputs: dict[str, tuple[int, list[str | int]]] = field(default_factory=dict)
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        dtype, size = _ONNX[self.precision], self.head_dim
        rows: list[str | int] = ["batch", "rows", 2 * size]
        cache: list[str | int] = ["batch", 2, "capacity", size]
        self.inputs = {
            "embeddings": (dtype, rows),
            "start": (TensorProto.INT64, ["batch"]),
            "key.0": (dtype, cache),
            "value.0": (dtype, list(cache)),
        }
        self.outputs = {
            "hidden": (dtype, list(rows)),
            "key.0.out": (dtype, list(cache)),
            "value.0.out": (dtype, list(cache)),
        }
        self.constants = {
            "heads": np.array([0, 0, 2, size], np.int64),
            "joined": np.array([0, 0, 2 * size], np.int64),
            "positions": np.arange(64, dtype=np.int64)[None, None, None, :],
            "axes": np.array([1, 2, 3], np.int64),
        }
        self.nodes = [
            helper.make_node("Reshape", ["embeddings", "heads"], ["split"]),
            helper.make_node("Transpose", ["split"], ["query"], perm=[0, 2, 1, 3]),
            helper.make_node("TensorScatter", ["key.0", "query", "start"], ["key.0.out"], axis=2),
            helper.make_node("TensorScatter", ["value.0", "query", "start"], ["value.0.out"], axis=2),
            helper.make_node("Unsqueeze", ["start", "axes"], ["here"]),
            helper.make_node("LessOrEqual", ["positions", "here"], ["seen"]),
            helper.make_node("Shape", ["embeddings"], ["rows"], start=1, end=2),
            helper.make_node("Constant", [], ["ones"], value_ints=[1, 1]),
            helper.make_node("Constant", [], ["one"], value_ints=[1]),
            helper.make_node("Concat", ["ones", "rows", "one"], ["spread"], axis=0),
            helper.make_node("Expand", ["seen", "spread"], ["mask"]),
            helper.make_node("Attention", ["query", "key.0.out", "value.0.out", "mask"], ["y"], scale=0.1),
            helper.make_node("Transpose", ["y"], ["back"], perm=[0, 2, 1, 3]),
            helper.make_node("Reshape", ["back", "joined"], ["hidden"]),
        ]

    def node(self, output: str) -> onnx.NodeProto:
        return next(node for node in self.nodes if node.output[0] == output)

    def insert(self, before: str, *nodes: onnx.NodeProto) -> None:
        place = self.nodes.index(self.node(before))
        self.nodes[place:place] = nodes

    def remove(self, *outputs: str) -> None:
        for output in outputs:
            self.nodes.remove(self.node(output))

    def spec(self) -> GraphSpec:
        """What the manifest says of the unspoilt graph."""
        names = {TensorProto.INT64: "int64", **{_ONNX[p]: _DTYPES[p] for p in _ONNX}}
        plain = Case(self.precision, self.head_dim)
        tensors = [
            tuple(TensorSpec(name, names[dtype], tuple(shape)) for name, (dtype, shape) in each.items())  # type: ignore[arg-type]
            for each in (plain.inputs, plain.outputs)
        ]
        aliases = {"key.0.out": "key.0", "value.0.out": "value.0"}
        return GraphSpec(
            path="draft.onnx", fused=None, inputs=tensors[0], outputs=tensors[1], aliases=aliases
        )

    def job(self, folder: Path) -> EngineJob:
        values = [
            [helper.make_tensor_value_info(name, dtype, shape) for name, (dtype, shape) in each.items()]
            for each in (self.inputs, self.outputs)
        ]
        constants = [numpy_helper.from_array(array, name) for name, array in self.constants.items()]
        graph = helper.make_graph(self.nodes, "draft", *values, constants)
        path = folder / "draft.onnx"
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11), path)
        header = load_header(path, capacity=64, cache_dtype=_DTYPES[self.precision])
        block = ProfileSpec(name="block", batch=AxisRange(1, 1, 1), rows=AxisRange(1, 4, 4))
        build = BuildKey(
            backend="tensorrt-rtx",
            backend_version="1",
            gpu=None,
            compute_capabilities=(89,),
            precision=self.precision,  # type: ignore[arg-type]
            version_compatible=False,
            hardware_compatible=False,
            workspace=None,
            tool="test",
        )
        return EngineJob("draft", self.spec(), header, (block,), build)


def refusal(vendor: Vendor, case: Case, folder: Path) -> str:
    with pytest.raises(EngineBuildError) as caught:
        prepare(vendor, case.job(folder))
    return str(caught.value)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_the_unspoilt_graph_builds(vendor: Vendor, tmp_path: Path, precision: str) -> None:
    assert len(memoryview(build_engine(vendor, Case(precision).job(tmp_path), SILENT))) > 1000


def test_an_interrupt_stops_the_build(
    vendor: Vendor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(monitor: BuildMonitor, name: str, step: int) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(BuildMonitor, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_engine(vendor, Case().job(tmp_path), SILENT)


# --- What the parser ignores ---


def test_an_input_that_nothing_uses(vendor: Vendor, tmp_path: Path) -> None:
    case = Case()
    case.inputs["extra"] = (TensorProto.FLOAT, ["batch"])
    job = case.job(tmp_path)
    job = EngineJob(job.graph, with_input(job.spec, "extra", "float32"), job.header, job.profiles, job.build)
    with pytest.raises(EngineBuildError, match="an input is used by no output") as caught:
        prepare(vendor, job)
    assert "found: extra" in str(caught.value)


def with_input(spec: GraphSpec, name: str, dtype: str) -> GraphSpec:
    inputs = (*spec.inputs, TensorSpec(name, dtype, ("batch",)))  # type: ignore[arg-type]
    return GraphSpec(path=spec.path, fused=None, inputs=inputs, outputs=spec.outputs, aliases=spec.aliases)


def test_lengths_that_the_parser_ignores(vendor: Vendor, tmp_path: Path) -> None:
    case = Case()
    case.inputs["lengths"] = (TensorProto.INT64, ["batch"])
    case.node("y").input.extend(["", "", "lengths"])
    job = case.job(tmp_path)
    job = EngineJob(job.graph, with_input(job.spec, "lengths", "int64"), job.header, job.profiles, job.build)
    with pytest.raises(EngineBuildError, match="an input is used by no output"):
        prepare(vendor, job)


def test_computed_lengths_that_the_parser_ignores(vendor: Vendor, tmp_path: Path) -> None:
    case = Case()
    case.insert("y", helper.make_node("Add", ["start", "rows"], ["lengths"]))
    case.node("y").input.extend(["", "", "lengths"])
    assert "the parser ignored what a node computes" in refusal(vendor, case, tmp_path)


# --- Caches ---


def test_a_cache_that_is_copied_on_its_way_out(vendor: Vendor, tmp_path: Path) -> None:
    case = Case()
    case.node("key.0.out").output[0] = "updated"
    case.node("y").input[1] = "updated"
    case.nodes.append(helper.make_node("Identity", ["updated"], ["key.0.out"]))
    assert "key.0.out isn't an updated cache" in refusal(vendor, case, tmp_path)


def test_a_cache_that_is_not_updated_in_place(vendor: Vendor, tmp_path: Path) -> None:
    case = Case()
    case.constants["two"] = np.array(2, np.float16)
    case.node("value.0.out").input[0] = "changed"
    case.insert("value.0.out", helper.make_node("Mul", ["value.0", "two"], ["changed"]))
    assert "value.0.out doesn't share the memory of value.0" in refusal(vendor, case, tmp_path)


def test_caches_that_are_swapped(vendor: Vendor, tmp_path: Path) -> None:
    case = Case()
    case.node("key.0.out").input[0], case.node("value.0.out").input[0] = "value.0", "key.0"
    assert "key.0.out doesn't share the memory of key.0" in refusal(vendor, case, tmp_path)


def test_a_cache_that_the_manifest_does_not_list(vendor: Vendor, tmp_path: Path) -> None:
    job = Case().job(tmp_path)
    spec = GraphSpec(
        path=job.spec.path,
        fused=None,
        inputs=job.spec.inputs,
        outputs=job.spec.outputs,
        aliases={"key.0.out": "key.0"},
    )
    job = EngineJob(job.graph, spec, job.header, job.profiles, job.build)
    with pytest.raises(EngineBuildError, match="a cache that the manifest doesn't list is updated"):
        prepare(vendor, job)


@pytest.mark.parametrize("cache", ["key", "value"])
def test_an_attention_over_a_copy_of_its_cache(vendor: Vendor, tmp_path: Path, cache: str) -> None:
    case = Case()
    case.constants["two"] = np.array(2, np.float16)
    case.insert("y", helper.make_node("Mul", [f"{cache}.0.out", "two"], ["copy"]))
    case.node("y").input[1 if cache == "key" else 2] = "copy"
    assert f"an attention reads a copy of its {cache}s" in refusal(vendor, case, tmp_path)


def test_only_a_product_with_one_is_taken_out(vendor: Vendor, tmp_path: Path) -> None:
    """A scale that is left in the attention becomes products that mean something."""
    job = Case().job(tmp_path)
    attention = next(node for node in job.header.model.graph.node if node.op_type == "Attention")
    next(a for a in attention.attribute if a.name == "scale").f = 0.25
    with pytest.raises(EngineBuildError, match="an attention reads a copy of its keys"):
        prepare(vendor, job)


# --- Attention ---


def test_an_attention_that_is_causal_by_itself(vendor: Vendor, tmp_path: Path) -> None:
    case = Case()
    del case.node("y").input[3:]
    case.node("y").attribute.append(helper.make_attribute("is_causal", 1))
    case.remove("mask", "spread", "one", "ones", "rows", "seen", "here")
    assert "an attention is causal by itself" in refusal(vendor, case, tmp_path)


def test_an_attention_without_a_mask(vendor: Vendor, tmp_path: Path) -> None:
    case = Case()
    del case.node("y").input[3:]
    case.remove("mask", "spread", "one", "ones", "rows", "seen", "here")
    assert "an attention has no mask" in refusal(vendor, case, tmp_path)


def test_a_mask_that_is_added(vendor: Vendor, tmp_path: Path) -> None:
    case = Case()
    case.insert("y", helper.make_node("Cast", ["mask"], ["bias"], to=TensorProto.FLOAT16))
    case.node("y").input[3] = "bias"
    assert "a mask is added to scores" in refusal(vendor, case, tmp_path)


@pytest.mark.parametrize("head_dim", [8, 512])
def test_a_head_size_without_a_fused_kernel(vendor: Vendor, tmp_path: Path, head_dim: int) -> None:
    job = Case(head_dim=head_dim).job(tmp_path)
    with pytest.raises(EngineBuildError, match="its attention has no fused kernel in fp16"):
        build_engine(vendor, job, SILENT)


def test_attention_in_16_bits_that_was_allowed_to_fall_apart(
    vendor: Vendor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit: Callable[[Network], None] = Network.limit_attention_to_valid_rows

    def careless(network: Network) -> None:
        edit(network)
        network.allow_unfused_attention()

    monkeypatch.setattr(Network, "limit_attention_to_valid_rows", careless)
    assert "an attention may be unfused" in refusal(vendor, Case(), tmp_path)


def test_an_attention_without_lengths(
    vendor: Vendor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Network, "limit_attention_to_valid_rows", lambda network: None)
    assert "an attention reads its whole cache" in refusal(vendor, Case(), tmp_path)


# --- The contract ---


def test_another_dtype(vendor: Vendor, tmp_path: Path) -> None:
    case = Case("bf16")
    job = case.job(tmp_path)
    job = EngineJob(job.graph, Case("fp16").spec(), job.header, job.profiles, job.build)
    with pytest.raises(EngineBuildError, match="embeddings has another dtype"):
        prepare(vendor, job)


def test_another_shape(vendor: Vendor, tmp_path: Path) -> None:
    job = Case().job(tmp_path)
    job.header.shapes["key.0"] = ("batch", 2, 65, 64)
    with pytest.raises(EngineBuildError, match=r"key\.0 has another shape"):
        prepare(vendor, job)


def test_an_output_that_is_missing(vendor: Vendor, tmp_path: Path) -> None:
    case = Case()
    del case.outputs["value.0.out"]
    assert "its outputs differ" in refusal(vendor, case, tmp_path)


# --- Edits ---


def tensors_of(ready: Prepared) -> tuple[list[str], bool]:
    """What makes query and key of the only attention, and whether its lengths are int32 ``[batch]``."""
    (attention,) = ready.network.attentions()
    made = [ready.network.producer(attention.get_input(index)) for index in (0, 1)]
    lengths = attention.key_value_lengths
    is_right = lengths.dtype == ready.network.trt.int32 and tuple(lengths.shape) == (-1,)
    return [str(layer.type).rpartition(".")[2] for layer in made if layer is not None], is_right


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_query_is_scaled_and_the_key_cache_is_read_as_it_is(
    vendor: Vendor, tmp_path: Path, precision: str
) -> None:
    assert tensors_of(prepare(vendor, Case(precision).job(tmp_path))) == (["CAST", "KV_CACHE_UPDATE"], True)


def test_the_scale_is_kept_and_computed_in_fp32(tmp_path: Path) -> None:
    """ONNX Runtime gets the same numbers from the changed header."""
    import onnxruntime as ort

    case = Case("fp32")
    header = case.job(tmp_path).header
    generator = np.random.default_rng(0)
    shapes = {"embeddings": (1, 3, 128), "key.0": (1, 2, 64, 64), "value.0": (1, 2, 64, 64)}
    feeds = {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    feeds["start"] = np.array([5], np.int64)
    options = ort.SessionOptions()
    options.log_severity_level = 3  # TensorScatter copies here, and says so
    before, after = (
        ort.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run(["hidden"], feeds)[0]
        for model in (str(tmp_path / "draft.onnx"), header.model.SerializeToString())
    )
    assert header.model.SerializeToString() != (tmp_path / "draft.onnx").read_bytes()
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-6)
    attention = next(node for node in header.model.graph.node if node.op_type == "Attention")
    assert [a.f for a in attention.attribute if a.name == "scale"] == [1.0]
