"""``manifest.json``: the contents of a bundle. The one-page specification is docs/reference/bundle.md.

Every class mirrors one JSON object: fields are keys, all of them required, in this order. Sizes are in bytes,
layer indices are 0-based, and layer i means the OUTPUT of decoder layer i.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from dflash_rt.bundle.graph_names import GRAPH_NAMES
from dflash_rt.bundle.schema import Bounds, OneOf, Pattern, Range
from dflash_rt.drafters import DRAFTERS

__all__ = [
    "ENGINES_FOLDER",
    "FORMAT",
    "FORMAT_VERSION",
    "MANIFEST_NAME",
    "REPORTS_FOLDER",
    "CalibrationInfo",
    "DrafterInfo",
    "FileRecord",
    "GenerationDefaults",
    "GraphSpec",
    "Limits",
    "Manifest",
    "Provenance",
    "QuantizationCost",
    "QuantizationInfo",
    "SamplingDefaults",
    "SourceInfo",
    "StateSpec",
    "TargetInfo",
    "TensorSpec",
    "TokenizerSpec",
    "is_file_path",
]

FORMAT = "dflash-bundle"
FORMAT_VERSION = 3
MANIFEST_NAME = "manifest.json"
REPORTS_FOLDER = "reports"
ENGINES_FOLDER = "engines"

DType: TypeAlias = Literal["int64", "float32", "float16", "bfloat16", "bool"]
JsonScalar: TypeAlias = str | int | float | bool | None
DrafterKind: TypeAlias = Annotated[str, OneOf(tuple(DRAFTERS))]
LayerType: TypeAlias = Literal["full_attention", "sliding_attention"]
Precision: TypeAlias = Literal["fp32", "fp16", "bf16"]
StateKind: TypeAlias = Literal["kv", "window"]
SourceKind: TypeAlias = Literal["hub", "folder", "gguf"]

# The layer limit also bounds the work of checking a hostile manifest.
LayerCount: TypeAlias = Annotated[int, Bounds(1, 1024)]
LayerIndex: TypeAlias = Annotated[int, Bounds(0, 1023)]
Count: TypeAlias = Annotated[int, Bounds(1, 2**31 - 1)]
TokenId: TypeAlias = Annotated[int, Bounds(0, 2**31 - 2)]
BlockSize: TypeAlias = Annotated[int, Bounds(2, 1024)]
Bytes: TypeAlias = Annotated[int, Bounds(0, 2**63 - 1)]
Text: TypeAlias = Annotated[str, Pattern(r"(?s).+", "text that isn't empty")]
Sha256: TypeAlias = Annotated[str, Pattern(r"[0-9a-f]{64}", "64 lower-case hexadecimal digits")]
AxisName: TypeAlias = Annotated[str, OneOf(("batch", "rows", "capacity"))]
GraphName: TypeAlias = Annotated[str, OneOf(GRAPH_NAMES)]
UtcTime: TypeAlias = Annotated[
    str, Pattern(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", "a UTC time like 2026-11-23T12:00:00Z")
]
# No empty, "." or ".." part, no leading or trailing "/", no backslash, and no colon (drives, streams).
_FILE_PATH = Pattern(
    r"(?=.{1,1024}\Z)(?!\.{1,2}(?:/|\Z))[^/\\:\x00-\x1f]{1,255}(?:/(?!\.{1,2}(?:/|\Z))[^/\\:\x00-\x1f]{1,255})*",
    "a path inside the bundle: relative, '/' between parts, no '.', '..', ':' or '\\'",
)
FilePath: TypeAlias = Annotated[str, _FILE_PATH]


def is_file_path(text: str) -> bool:
    """Whether it is a path as manifests may have it: relative, and inside the folder."""
    return _FILE_PATH.accepts(text)


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size in bytes and SHA-256 of one file."""

    size: Bytes
    sha256: Sha256


@dataclass(frozen=True, slots=True)
class Limits:
    """``max_seq_len``: prompt plus output tokens. ``prefill_chunk``: rows of one prefill pass at most."""

    max_seq_len: Count
    prefill_chunk: Count


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceInfo:
    """Where a model came from: repository id, folder name or file name, and the files that were read."""

    kind: SourceKind
    id: Text
    revision: Text | None
    files: Mapping[FilePath, FileRecord]


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetInfo:
    """The target model's geometry."""

    source: SourceInfo
    model_type: Text
    num_layers: LayerCount
    hidden_size: Count
    vocab_size: Count
    num_key_value_heads: Count
    head_dim: Count
    max_position_embeddings: Count
    tie_word_embeddings: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DrafterInfo:
    """The drafter. ``block_size`` counts the anchor; ``feature_layers`` are the tapped target layers.

    ``vocab_size`` are the rows of the head that drafts, ``selector_top_k`` the candidates among which a
    DFlash 2 drafter chooses. With ``samples_from_anchor`` the anchor's own row drafts too, so that a draft
    pass has one row less than the block.
    """

    source: SourceInfo
    kind: DrafterKind
    num_layers: LayerCount
    num_key_value_heads: Count
    head_dim: Count
    block_size: BlockSize
    mask_token_id: TokenId
    feature_layers: tuple[LayerIndex, ...]
    layer_types: tuple[LayerType, ...]
    layer_is_causal: tuple[bool, ...]
    sliding_window: Count | None
    vocab_size: Count
    samples_from_anchor: bool
    selector_top_k: Count | None

    @property
    def is_windowed(self) -> bool:
        """Whether all layers slide: the caches then hold a window, and row 0 of them is at an ``offset``."""
        return set(self.layer_types) == {"sliding_attention"}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output of a graph; in ``shape`` a string is a symbolic axis and an integer a fixed one."""

    name: Text
    dtype: DType
    shape: tuple[AxisName | Count, ...]

    def sized(self, *, batch: int, rows: int = 0, capacity: int = 0) -> tuple[int, ...]:
        """The shape with numbers for its symbolic axes."""
        sizes = {"batch": batch, "rows": rows, "capacity": capacity}
        return tuple(sizes[axis] if isinstance(axis, str) else axis for axis in self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphSpec:
    """One ONNX file. ``aliases`` maps an output to the input whose memory it shares.

    ``fused`` is the same graph in operators of ONNX Runtime, which its CPU backend runs instead.
    """

    path: FilePath
    fused: FilePath | None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    aliases: Mapping[str, str]

    def tensor(self, name: str) -> TensorSpec:
        """The input or output of that name."""
        return next(tensor for tensor in (*self.inputs, *self.outputs) if tensor.name == name)

    @property
    def is_lookup(self) -> bool:
        """Whether it looks up rows of an embedding, which needs no pool of threads."""
        return [tensor.name for tensor in self.inputs] == ["input_ids"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StateSpec:
    """State that a slot keeps between calls: inputs of ``graphs`` whose outputs lie in the same memory.

    ``kv`` has a row for each position. A ``window`` needs the last rows only: a block sees ``window`` rows
    before itself.
    """

    name: Text
    kind: StateKind
    graphs: tuple[Text, ...]
    tensors: tuple[Text, ...]
    window: Count | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerSpec:
    """Files of the tokenizer, and the special tokens that chat templates print."""

    path: FilePath
    chat_template: FilePath | None
    bos_token: str | None
    eos_token: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingDefaults:
    """Fields of :class:`~dflash_rt.sampling.params.SamplingParams` that a target's generation config sets."""

    temperature: Annotated[float, Range(0.0, 100.0)]
    top_p: Annotated[float, Range(0.0, 1.0)]
    top_k: Annotated[int, Bounds(0, 2**31 - 1)]
    min_p: Annotated[float, Range(0.0, 1.0)]
    repetition_penalty: Annotated[float, Range(0.01, 100.0)]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """A request's defaults. A step drafts ``num_draft_tokens`` at most; 0 is plain decoding."""

    stop_token_ids: tuple[TokenId, ...]
    num_draft_tokens: Annotated[int, Bounds(0, 2**31 - 1)]
    chat_template_kwargs: Mapping[Text, JsonScalar]
    sampling: SamplingDefaults


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationCost:
    """The loss by quantisation, measured in PyTorch when the bundle was built (docs/guide/quantize.md).

    ``tokens`` of text by the target before quantisation; in which share of them its best token is still the
    best, and the mean Kullback-Leibler divergence in nats. Tokens per step are null where they weren't
    measured.
    """

    tokens: Count
    top1_agreement: Annotated[float, Range(0.0, 1.0)]
    kl_divergence: Annotated[float, Range(0.0, 1e6)]
    tokens_per_step_before: Annotated[float, Range(1.0, 1024.0)] | None
    tokens_per_step: Annotated[float, Range(1.0, 1024.0)] | None


@dataclass(frozen=True, slots=True)
class CalibrationInfo:
    """The text that a target was calibrated on: its own answers to ``prompts``.

    The SHA-256 is of the token ids, as little-endian int32.
    """

    prompts: Count
    tokens: Count
    sha256: Sha256


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationInfo:
    """How the target's linear layers are computed; ``bytes`` of its weights and the head's, and before.

    ``activations`` is the type that inputs of products are rounded to; null: they aren't. ``head`` and
    ``drafter`` are how those weights are stored, null if they aren't quantised. Without ``block_size`` an
    output has one scale.
    """

    weights: Literal["int4", "int8", "fp8"]
    activations: Literal["int8", "fp8"] | None
    head: Literal["int8", "int4"] | None
    drafter: Literal["int8"] | None
    block_size: Annotated[int, Bounds(16, 256)] | None
    method: Literal["awq", "smoothquant", "max", "rtn"]
    calibration: CalibrationInfo | None
    bytes: Bytes
    bytes_before: Bytes
    cost: QuantizationCost | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """When, by what and with which versions and options the bundle was built."""

    created: UtcTime
    tool: Text
    packages: Mapping[Text, Text]
    options: Mapping[Text, JsonScalar]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A whole manifest. ``files`` lists every file of the bundle except manifest.json and reports/."""

    format: Literal["dflash-bundle"]
    format_version: Annotated[int, Bounds(FORMAT_VERSION, FORMAT_VERSION)]
    name: Text
    precision: Precision
    quantization: QuantizationInfo | None
    limits: Limits
    target: TargetInfo
    drafter: DrafterInfo
    graphs: Mapping[GraphName, GraphSpec]
    state: tuple[StateSpec, ...]
    tokenizer: TokenizerSpec | None
    generation: GenerationDefaults
    provenance: Provenance
    files: Mapping[FilePath, FileRecord]
