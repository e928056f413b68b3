"""The ONNX files of a bundle: plain operators, symbolic axes, nothing stored twice, no machine paths.

One of them may be other than plain: the fused target, and nothing but two operators in it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import transformers
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from dflash_export import build
from dflash_export.sources.resolve import open_weights, resolve_drafter, resolve_target
from dflash_rt import Bundle
from dflash_rt.backends.cpu.backend import OnnxRuntimeBackend
from dflash_rt.errors import BackendError
from tests.pairs import (
    FAMILIES,
    Graphs,
    TargetSpec,
    drafter_config,
    make_drafter,
    make_target,
    run_loop,
)

# A drafter that needs the optional graph too, and as many kinds of layer as there are.
DRAFTER = {
    "final_logit_softcapping": 5.0,
    "use_sliding_window": True,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention"],
}
SPECS = {
    family: TargetSpec(family, tied=number % 2 == 0, layers=2, vocab=40)
    for number, family in enumerate(FAMILIES)
}
# A target that has a fused form as well.
FUSED = "smollm2, heads of 16"
SPECS[FUSED] = TargetSpec("smollm2", head_dim=16, layers=2, vocab=40)
FUSED_OPERATORS = {"GroupQueryAttention", "SkipSimplifiedLayerNormalization"}
ONNX_TYPES = {"float32": 1, "int64": 7, "float16": 10, "bfloat16": 16}


class Pairs:
    """One bundle per family and precision, built when a test first asks for it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.bundle = cache(self._build)

    def _build(self, family: str, precision: str = "fp32") -> Bundle:
        folder = self.root / family
        if not folder.exists():
            make_target(folder / "target", SPECS[family])
            make_drafter(folder / "drafter", drafter_config(SPECS[family], **DRAFTER))
        return build(folder / "target", folder / "drafter", folder / precision, precision=precision)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    return Pairs(tmp_path_factory.mktemp("pairs"))


def onnx_files(bundle: Bundle) -> Iterator[tuple[str, onnx.ModelProto]]:
    """The plain graphs, by name."""
    for name in bundle.manifest.graphs:
        yield name, onnx.load(bundle.graph_path(name), load_external_data=False)


def every_onnx_file(bundle: Bundle) -> Iterator[tuple[str, Path, onnx.ModelProto]]:
    """Every ONNX file in the folder, with the graph whose form it is. Each has to belong to one."""
    owners = {spec.path: name for name, spec in bundle.manifest.graphs.items()}
    owners |= {spec.fused: name for name, spec in bundle.manifest.graphs.items() if spec.fused}
    found = sorted(bundle.root.rglob("*.onnx"))
    assert {path.relative_to(bundle.root).as_posix() for path in found} == set(owners)
    for path in found:
        yield owners[path.name], path, onnx.load(path, load_external_data=False)


def stored_places(bundle: Bundle) -> dict[str, dict[str, tuple[str, int, int]]]:
    """File, offset and length of every external initializer, by graph and name."""
    return {graph: places_of(model) for graph, model in onnx_files(bundle)}


def places_of(model: onnx.ModelProto) -> dict[str, tuple[str, int, int]]:
    infos = {t.name: ExternalDataInfo(t) for t in model.graph.initializer if uses_external_data(t)}
    return {name: (info.location, info.offset, info.length) for name, info in infos.items()}


def numbers_in_checkpoint(folder: Path, *, tied: bool) -> int:
    source = resolve_drafter(folder) if folder.name == "drafter" else resolve_target(folder)
    with open_weights(source) as weights:
        names = [name for name in weights.names() if not (tied and name == "lm_head.weight")]
        return sum(int(np.prod(weights.shape(name))) for name in names)


@pytest.mark.parametrize("family", SPECS)
def test_files_are_plain_onnx(pairs: Pairs, family: str) -> None:
    """All but the one that the manifest calls the fused target, and in that one all but two operators."""
    bundle = pairs.bundle(family)
    fused = bundle.fused_path("target")
    assert (fused is not None) == (family == FUSED)
    for _, path, model in every_onnx_file(bundle):
        onnx.checker.check_model(path, full_check=True)
        domains = {"": 24, "com.microsoft": 1} if path == fused else {"": 24}
        assert {entry.domain: entry.version for entry in model.opset_import} == domains
        assert len(model.functions) == 0
        others = {(node.domain, node.op_type) for node in model.graph.node if node.domain}
        operators = FUSED_OPERATORS if path == fused else set()
        assert others == {("com.microsoft", operator) for operator in operators}
        assert all(
            attribute.type not in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
            for node in model.graph.node
            for attribute in node.attribute
        ), "subgraphs would need the same checks"


@pytest.mark.parametrize("family", SPECS)
def test_what_operators_mean_is_kept(pairs: Pairs, family: str) -> None:
    """Fused operators are what backends turn into fast kernels: none of them may fall apart."""
    bundle = pairs.bundle(family)
    layers = {"target": 2, "draft": 2, "inject": 0}
    for name, model in onnx_files(bundle):
        kinds = [node.op_type for node in model.graph.node]
        if name in layers:
            assert kinds.count("Attention") == layers[name]
            assert kinds.count("TensorScatter") == 2 * 2
            assert kinds.count("RotaryEmbedding") == (2 if name == "inject" else 4)
            assert {"Pow", "ReduceMean", "Sqrt"} & set(kinds) == set(), "a norm fell apart"
            assert kinds.count("RMSNormalization") >= (3 if name == "inject" else 5)
            # One to heads for all of q, k and v, with bias and norms or not; one back.
            assert kinds.count("Transpose") == (1 if name == "inject" else 2 * 2)
    for _, _, model in every_onnx_file(bundle):
        read = {source for node in model.graph.node for source in node.input}
        assert {value.name for value in model.graph.input} <= read, "an input that nothing reads"
        assert {tensor.name for tensor in model.graph.initializer} <= read, "a weight that nothing reads"


@pytest.mark.parametrize("family", SPECS)
def test_inputs_and_outputs_are_those_of_the_manifest(pairs: Pairs, family: str) -> None:
    bundle = pairs.bundle(family)
    assert "draft_logits" in bundle.manifest.graphs
    for name, _, model in every_onnx_file(bundle):
        spec = bundle.manifest.graphs[name]
        for listed, values in ((spec.inputs, model.graph.input), (spec.outputs, model.graph.output)):
            assert [tensor.name for tensor in listed] == [value.name for value in values]
            for tensor, value in zip(listed, values, strict=True):
                found = value.type.tensor_type
                axes = tuple(
                    axis.dim_param if axis.HasField("dim_param") else axis.dim_value
                    for axis in found.shape.dim
                )
                assert axes == tensor.shape
                assert found.elem_type == ONNX_TYPES[tensor.dtype]
                assert {"batch", "rows", "capacity"} >= {axis for axis in axes if isinstance(axis, str)}
                assert axes[0] == "batch"
        caches = [tensor.name for tensor in spec.inputs if "capacity" in tensor.shape]
        assert spec.aliases == {f"{name}.out": name for name in caches}
        if name in ("target", "inject", "draft"):
            assert len(caches) == 4


@pytest.mark.parametrize("family", SPECS)
def test_files_say_nothing_of_this_machine(pairs: Pairs, family: str) -> None:
    bundle = pairs.bundle(family)
    here = [
        str(Path(__file__).parents[3]),
        str(bundle.root.parent),
        torch.__path__[0],
        transformers.__path__[0],
    ]
    words = [*here, "site-packages", ".py", os.sep + "tmp", "stack_trace", "aten."]
    for path in [*(path for _, path, _ in every_onnx_file(bundle)), bundle.root / "manifest.json"]:
        content = path.read_bytes()
        assert [word for word in words if word.encode() in content] == []


@pytest.mark.parametrize("family", SPECS)
def test_weights_are_outside_and_stored_once(pairs: Pairs, family: str) -> None:
    bundle, tied = pairs.bundle(family), SPECS[family].tied
    places = stored_places(bundle)
    for name, path, model in every_onnx_file(bundle):
        assert path.stat().st_size < 100_000
        inline = [tensor for tensor in model.graph.initializer if not uses_external_data(tensor)]
        if path == bundle.fused_path("target"):
            rows, size = bundle.manifest.limits.max_seq_len + 4, bundle.manifest.target.head_dim // 2
            tables = {
                tensor.name: list(tensor.dims) for tensor in inline if tensor.name.startswith("rotary.")
            }
            assert tables == {"rotary.cos": [rows, size], "rotary.sin": [rows, size]}
            inline = [tensor for tensor in inline if tensor.name not in tables]
            assert places_of(model) == places[name], "the same bytes as the plain graph's"
        assert sum(int(np.prod(tensor.dims)) for tensor in inline) < 64, "only constants such as frequencies"
    for file, offset, length in {place for of_graph in places.values() for place in of_graph.values()}:
        assert file in bundle.manifest.files
        assert 0 <= offset < offset + length <= bundle.manifest.files[file].size

    (embedding,), (head,) = places["embed"].values(), places["lm_head"].values()
    assert (embedding == head) is tied
    vocabulary_bytes = SPECS[family].vocab * SPECS[family].hidden * 4
    assert embedding[2] == head[2] == vocabulary_bytes

    # Exactly the checkpoints' bytes, and the drafter's k_proj and v_proj once more: `inject` multiplies those
    # of all layers in one go, and `draft` those of one layer together with its q_proj.
    stored = sum(
        length for _, _, length in {place for of_graph in places.values() for place in of_graph.values()}
    )
    folder = bundle.root.parent
    distinct = numbers_in_checkpoint(folder / "target", tied=tied) + numbers_in_checkpoint(
        folder / "drafter", tied=False
    )
    drafter = bundle.manifest.drafter
    key_value = 2 * drafter.num_layers * drafter.num_key_value_heads * drafter.head_dim * SPECS[family].hidden
    assert stored == 4 * (distinct + key_value)


def test_nothing_overlaps(pairs: Pairs) -> None:
    places = {place for graph in stored_places(pairs.bundle("qwen2")).values() for place in graph.values()}
    end: dict[str, int] = {}
    for file, offset, length in sorted(places):
        assert offset >= end.get(file, 0)
        assert offset % 64 == 0
        end[file] = offset + length


# --- 16 bits ---


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_16_bits(pairs: Pairs, family: str, precision: str) -> None:
    whole, half = pairs.bundle(family), pairs.bundle(family, precision)
    dtype = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}[precision]
    assert half.manifest.precision == precision
    for name, model in onnx_files(half):
        onnx.checker.check_model(half.graph_path(name), full_check=True)
        weights = {
            tensor.name: tensor.data_type for tensor in model.graph.initializer if uses_external_data(tensor)
        }
        # Sums of real features overflow fp16: what they run through first stays in fp32.
        in_fp32 = {key for key in weights if ".fc." in key or ".hidden_norm." in key}
        assert len(in_fp32) == (2 if name == "inject" else 0)
        for key, found in weights.items():
            assert found == (onnx.TensorProto.FLOAT if key in in_fp32 and precision == "fp16" else dtype), key
    sizes = [
        sum(record.size for name, record in bundle.manifest.files.items() if name.endswith(".data"))
        for bundle in (whole, half)
    ]
    assert 0.5 <= sizes[1] / sizes[0] < 0.65  # fc is a large part of a drafter this small


def test_logits_of_fp16_are_near_those_of_fp32(pairs: Pairs) -> None:
    graphs = Graphs(pairs.bundle("qwen3", "fp16"))
    token_ids = np.random.default_rng(0).integers(0, 40, (1, 12))
    caches = graphs.junk_caches("target", 1, 16)
    first = graphs.target(caches, token_ids[:, :7], np.array([0]))["logits"]
    second = graphs.target(caches, token_ids[:, 7:], np.array([7]))["logits"]
    assert first.dtype == np.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(
        pairs.root / "qwen3" / "target", dtype=torch.float32
    )
    with torch.inference_mode():
        expected = model(torch.from_numpy(token_ids)).logits.numpy()
    difference = np.abs(np.concatenate([first, second], 1) - expected).max()
    assert difference < 0.02 * expected.std()


def test_fp16_survives_features_that_overflow_it(pairs: Pairs) -> None:
    """Real features reach 2e4, and sums of them don't fit fp16. The norm after ``fc`` shrinks them again."""
    graphs = Graphs(pairs.bundle("qwen3", "fp16"))
    width = graphs.manifest.graphs["inject"].inputs[0].shape[2]
    features = np.full((1, 3, width), 2e4, np.float16) * np.sign(np.arange(width) % 3 - 0.5).astype(
        np.float16
    )
    caches = graphs.junk_caches("inject", 1, 8)
    graphs.run("inject", caches, features=features, start=np.array([0]))
    assert all(np.isfinite(array).all() and np.abs(array[:, :, :3]).max() > 0 for array in caches.values())


def test_fp16_decodes(pairs: Pairs) -> None:
    bundle = pairs.bundle("qwen3", "fp16")
    backend = OnnxRuntimeBackend(bundle, threads=1)
    prompt = [1, 2, 3, 4, 5]
    assert len(run_loop(backend, bundle, prompt, 20, 4).token_ids) == 20


def test_bf16_is_refused_with_advice_where_there_are_no_kernels(pairs: Pairs) -> None:
    with pytest.raises(BackendError, match="--precision fp32"):
        OnnxRuntimeBackend(pairs.bundle("qwen3", "bf16"), threads=1)


def test_the_demo_bundle_has_one_vocabulary_matrix(smollm2_bundle: Bundle) -> None:
    (embedding,), (head,) = (stored_places(smollm2_bundle)[graph].values() for graph in ("embed", "lm_head"))
    assert embedding == head
    assert smollm2_bundle.manifest.files[embedding[0]].size == embedding[2] == 49152 * 576 * 4
