"""A drafter's configuration; here read from z-lab's format, both generations of it.

Old files have ``block_size``, ``rope_theta`` and ``rope_scaling`` at the top level; new ones nest
``block_size`` in ``dflash_config`` and have ``rope_parameters``. What a value means follows the reference,
``dflash/model.py`` of the PyPI package ``dflash`` 0.1.0, and the ``Qwen3Config`` that it builds from the same
file. The speculators format is read by :mod:`dflash_export.drafters.speculators`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dflash_export.drafters.kind import DFLASH2_KEYS, DrafterKind, drafter_kind
from dflash_export.sources.config_reader import ConfigReader, Findings
from dflash_export.sources.files import read_json
from dflash_export.sources.resolve import Source
from dflash_export.targets.rope import normalised_rope, rope_problems
from dflash_rt.errors import CheckpointError, ExportError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import Qwen3Config

__all__ = [
    "Convolution",
    "DrafterConfig",
    "Selector",
    "build_target_layer_ids",
    "load_drafter_config",
    "parse_drafter_config",
    "parse_zlab_config",
    "read_drafter_config",
]

_LAYER_TYPES = ("full_attention", "sliding_attention")
_DFLASH_KEYS = frozenset(
    {
        "block_size",
        "causal",
        "final_logit_softcapping",
        "input_embedding_scale",
        "is_causal",
        "mask_token_id",
        "output_multiplier",
        "target_layer_ids",
    }
)


@dataclass(frozen=True)
class Convolution:
    """Causal convolutions around each half of a DFlash 2 layer: taps, and channels that share a kernel."""

    kernel_size: int
    group_size: int


@dataclass(frozen=True)
class Selector:
    """DFlash 2's candidate selector: width of its codebooks, and candidates for each row."""

    rank: int
    top_k: int


@dataclass(frozen=True)
class DrafterConfig:
    """One drafter. Sizes are counts; ``block_size`` counts the anchor row, so ``block_size - 1`` tokens are
    drafted.

    ``feature_layers`` are 0-based target layers whose output is tapped (z-lab's ``target_layer_ids``).
    ``sliding_window`` is ``None`` when ``use_sliding_window`` is false, as ``Qwen3Config`` has it: a layer of
    type ``sliding_attention`` is then causal and sees everything before it. ``is_causal`` is the file's own
    setting for all layers, ``None`` where it has none; see :attr:`layer_is_causal`. ``rope_parameters`` are
    in transformers 5's form. The three factors are neutral at 1, 1 and ``None``.

    ``convolution`` and ``selector`` belong to DFlash 2. The last three are for the speculators format:
    ``draft_vocab_size`` are the rows of the drafter's own head (``None``: it uses the target's);
    ``samples_from_anchor`` says that the anchor's row drafts too, and ``block_size`` is then one more than
    the rows of a draft pass; ``window_from_anchor`` counts windows from the anchor.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    num_target_layers: int | None
    max_position_embeddings: int
    rms_norm_eps: float
    hidden_act: str
    attention_bias: bool
    block_size: int
    mask_token_id: int
    feature_layers: tuple[int, ...]
    layer_types: tuple[str, ...]
    sliding_window: int | None
    is_causal: bool | None
    rope_parameters: Mapping[str, Any]
    input_embedding_scale: float = 1.0
    output_multiplier: float = 1.0
    final_logit_softcapping: float | None = None
    kind: DrafterKind = "dflash-v1"
    convolution: Convolution | None = None
    selector: Selector | None = None
    draft_vocab_size: int | None = None
    samples_from_anchor: bool = False
    window_from_anchor: bool = False

    @property
    def layer_is_causal(self) -> tuple[bool, ...]:
        """Whether rows of the block see only rows before them, per layer.

        ``Qwen3DFlashAttention.__init__`` of the reference: ``is_causal`` where it is set, else sliding layers
        are causal and full ones aren't, whether or not there is a window.
        """
        if self.is_causal is not None:
            return (self.is_causal,) * len(self.layer_types)
        return tuple(kind == "sliding_attention" for kind in self.layer_types)

    @property
    def layer_windows(self) -> tuple[int | None, ...]:
        """Window in rows per layer, ``None`` for no limit.

        A row at position p sees keys at positions above ``p - window``, and in a layer that isn't causal only
        those below ``p + window`` (``_attention_mask`` of the reference). With ``window_from_anchor`` every
        row of a block sees ``window`` rows before the anchor, and rows of the block whatever their distance.
        """
        sliding = (kind == "sliding_attention" for kind in self.layer_types)
        return tuple(self.sliding_window if slides else None for slides in sliding)

    @property
    def is_windowed(self) -> bool:
        """Whether no layer sees further back than its window, so that the caches need hold no more."""
        return None not in self.layer_windows

    @property
    def has_logit_transform(self) -> bool:
        """Whether draft logits differ from the target head's own logits, so that a graph of their own is
        needed.
        """
        return self.output_multiplier != 1.0 or self.final_logit_softcapping is not None

    @property
    def own_graphs(self) -> tuple[str, ...]:
        """Names of the graphs that only some drafters have, in the order in which they are traced."""
        wanted = {
            "draft_embed": self.draft_vocab_size is not None,
            "draft_lm_head": self.draft_vocab_size is not None,
            "draft_logits": self.has_logit_transform,
            "select": self.selector is not None,
        }
        return tuple(name for name, is_wanted in wanted.items() if is_wanted)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that the checkpoint has to hold, no more and no fewer."""
        hidden, inner, head_dim = self.hidden_size, self.intermediate_size, self.head_dim
        queries, keys = self.num_attention_heads * head_dim, self.num_key_value_heads * head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "fc.weight": (hidden, len(self.feature_layers) * hidden),
            "hidden_norm.weight": (hidden,),
            "norm.weight": (hidden,),
        }
        for layer in range(self.num_layers):
            prefix = f"layers.{layer}."
            for norm in ("input_layernorm", "post_attention_layernorm"):
                shapes[f"{prefix}{norm}.weight"] = (hidden,)
            for norm in ("q_norm", "k_norm"):
                shapes[f"{prefix}self_attn.{norm}.weight"] = (head_dim,)
            for name, rows, columns in (
                ("self_attn.q_proj", queries, hidden),
                ("self_attn.k_proj", keys, hidden),
                ("self_attn.v_proj", keys, hidden),
                ("self_attn.o_proj", hidden, queries),
                ("mlp.gate_proj", inner, hidden),
                ("mlp.up_proj", inner, hidden),
                ("mlp.down_proj", hidden, inner),
            ):
                shapes[f"{prefix}{name}.weight"] = (rows, columns)
                if self.attention_bias and name.startswith("self_attn."):
                    shapes[f"{prefix}{name}.bias"] = (rows,)
        return shapes | self._kind_shapes()

    def _kind_shapes(self) -> dict[str, tuple[int, ...]]:
        hidden, shapes = self.hidden_size, dict[str, tuple[int, ...]]()
        if self.convolution is not None:
            taps, groups = self.convolution.kernel_size, hidden // self.convolution.group_size
            for layer in range(self.num_layers):
                for name in ("attention_conv", "mlp_conv"):
                    shapes[f"layers.{layer}.{name}.base_kernel"] = (2, taps, hidden)
                    shapes[f"layers.{layer}.{name}.kernel_projection.weight"] = (2 * taps * groups, hidden)
        if self.selector is not None:
            rank = self.selector.rank
            shapes["candidate_selector.hidden_projection.weight"] = (rank, hidden)
            for name in ("predecessor_codebook", "successor_codebook"):
                shapes[f"candidate_selector.{name}"] = (self.vocab_size, rank)
        if self.draft_vocab_size is not None:
            shapes["embed_tokens.weight"] = (self.vocab_size, hidden)
            shapes["lm_head.weight"] = (self.draft_vocab_size, hidden)
            if self.draft_vocab_size != self.vocab_size:
                shapes |= {"d2t": (self.draft_vocab_size,), "t2d": (self.vocab_size,)}
        return shapes

    def to_qwen3_config(self) -> Qwen3Config:
        """The ``Qwen3Config`` for building the modules that are traced.

        Raises :class:`~dflash_rt.errors.CheckpointError` when transformers refuses the values.
        """
        from transformers import Qwen3Config

        own: dict[str, Any] = {
            "num_target_layers": self.num_target_layers,
            "block_size": self.block_size,
            "dflash_config": self._dflash_config(),
        }
        if self.is_causal is not None:
            own["is_causal"] = self.is_causal
        try:
            return Qwen3Config(
                vocab_size=self.vocab_size,
                hidden_size=self.hidden_size,
                intermediate_size=self.intermediate_size,
                num_hidden_layers=self.num_layers,
                num_attention_heads=self.num_attention_heads,
                num_key_value_heads=self.num_key_value_heads,
                head_dim=self.head_dim,
                hidden_act=self.hidden_act,
                max_position_embeddings=self.max_position_embeddings,
                rms_norm_eps=self.rms_norm_eps,
                rope_parameters=dict(self.rope_parameters),
                attention_bias=self.attention_bias,
                use_sliding_window=self.sliding_window is not None,
                sliding_window=self.sliding_window,
                layer_types=list(self.layer_types),
                tie_word_embeddings=False,
                **own,
            )
        # The strict config classes raise validation errors of their own besides ValueError and KeyError.
        except Exception as error:
            raise CheckpointError(
                "transformers refuses the drafter's configuration",
                found=f"{type(error).__name__}: {error}",
                expected="values that Qwen3Config accepts",
                remedy="compare config.json with the published one",
            ) from error

    def _dflash_config(self) -> dict[str, Any]:
        return {
            "block_size": self.block_size,
            "mask_token_id": self.mask_token_id,
            "target_layer_ids": list(self.feature_layers),
            "input_embedding_scale": self.input_embedding_scale,
            "output_multiplier": self.output_multiplier,
            "final_logit_softcapping": self.final_logit_softcapping,
        }


def load_drafter_config(source: Source) -> DrafterConfig:
    """Read config.json of a drafter. Raises what :func:`parse_drafter_config` raises."""
    return parse_drafter_config(read_json(source.path / "config.json"))


def read_drafter_config(source: Source) -> tuple[DrafterConfig | None, Findings]:
    """The same without raising: what could be read, and what is wrong with it.

    The config is of use for what doesn't depend on the names in :attr:`Findings.wrong`; it is None where the
    file can't be read at all, or is of no kind that is known.
    """
    findings = Findings()
    try:
        return _parse(read_json(source.path / "config.json"), findings), findings
    except ExportError as error:
        findings.add(error)
        return None, findings


def build_target_layer_ids(num_target_layers: int, num_draft_layers: int) -> tuple[int, ...]:
    """Taps of a drafter that doesn't list them: spread from layer 1 to the third layer from the end.

    The rule of the reference's function of the same name, Python's rounding of halves to even included.
    """
    if num_draft_layers == 1:
        return (num_target_layers // 2,)
    span = num_target_layers - 4
    return tuple(round(1 + index * span / (num_draft_layers - 1)) for index in range(num_draft_layers))


def parse_drafter_config(raw: Mapping[str, Any]) -> DrafterConfig:
    """Read the object of a config.json of any supported kind.

    Raises :class:`~dflash_rt.errors.UnsupportedModelError` for another kind of drafter and
    :class:`~dflash_rt.errors.CheckpointError` for values that are missing, of the wrong type, or
    contradictory, all of them at once. Whether the values fit a target, and one another, is for
    :mod:`dflash_export.pairing.pair`.
    """
    findings = Findings()
    try:
        config = _parse(raw, findings)
    except ExportError as error:  # what it can't go on after
        findings.add(error)
        findings.raise_any()
        raise
    findings.raise_any()
    return config


def _parse(raw: Mapping[str, Any], findings: Findings) -> DrafterConfig:
    kind = drafter_kind(raw)
    if kind == "speculators":
        from dflash_export.drafters.speculators import parse_speculators_config

        return parse_speculators_config(raw, findings)
    return parse_zlab_config(raw, kind, findings)


def parse_zlab_config(raw: Mapping[str, Any], kind: DrafterKind, findings: Findings) -> DrafterConfig:
    """Read z-lab's format once the kind is known, and add to ``findings`` what is wrong with it."""
    is_dflash2 = kind == "dflash-v2"
    read = ConfigReader(raw, _DFLASH_KEYS | (DFLASH2_KEYS if is_dflash2 else frozenset()), findings)
    layers, heads = read.count("num_hidden_layers"), read.count("num_attention_heads")
    target_layers = read.count("num_target_layers")
    if (
        findings.wrong & {"num_hidden_layers", "num_target_layers"}
        and read.raw("target_layer_ids", None) is None
    ):
        findings.wrong.add("target_layer_ids")  # the default would follow from stand-ins
    softcap = read.optional_number("final_logit_softcapping")
    is_causal = raw.get("is_causal")
    # Values that are absent are Qwen3Config's own defaults: the reference builds its modules from that class.
    config = DrafterConfig(
        hidden_size=read.count("hidden_size"),
        intermediate_size=read.count("intermediate_size"),
        num_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=(
            heads if read.raw("num_key_value_heads", 0) is None else read.count("num_key_value_heads", 32)
        ),
        head_dim=read.count("head_dim", 128),
        vocab_size=read.count("vocab_size"),
        num_target_layers=target_layers,
        max_position_embeddings=read.count("max_position_embeddings", 32768),
        rms_norm_eps=read.number("rms_norm_eps", 1e-6),
        hidden_act=read.text("hidden_act", "silu"),
        attention_bias=read.flag("attention_bias"),
        block_size=read.count("block_size"),
        mask_token_id=read.index("mask_token_id"),
        feature_layers=read.indices("target_layer_ids", build_target_layer_ids(target_layers, layers)),
        layer_types=_layer_types(read, layers),
        sliding_window=_sliding_window(read),
        # The reference reads this one at the top level only; _check_causality compares the other spellings.
        is_causal=is_causal if type(is_causal) is bool else None,
        rope_parameters=_rope(raw, read.count("max_position_embeddings", 32768), findings),
        input_embedding_scale=read.number("input_embedding_scale", 1.0),
        output_multiplier=read.number("output_multiplier", 1.0),
        # The reference applies the cap only where it is above zero.
        final_logit_softcapping=softcap if softcap is not None and softcap > 0 else None,
        kind=kind,
        convolution=(
            Convolution(read.count("conv_kernel_size"), read.count("conv_group_size")) if is_dflash2 else None
        ),
        selector=Selector(read.count("selector_rank"), read.count("selector_top_k")) if is_dflash2 else None,
    )
    _check_causality(read, config)
    return config


def _sliding_window(read: ConfigReader) -> int | None:
    if not read.flag("use_sliding_window") or read.raw("sliding_window", 4096) is None:
        return None
    return read.count("sliding_window", 4096)


def _layer_types(read: ConfigReader, layers: int) -> tuple[str, ...]:
    kinds = read.raw("layer_types", None)
    if kinds is None:
        first = layers if _sliding_window(read) is None else read.index("max_window_layers", 28)
        return tuple(_LAYER_TYPES[layer >= first] for layer in range(layers))
    if not isinstance(kinds, list) or any(kind not in _LAYER_TYPES for kind in kinds):
        error = UnsupportedModelError(
            "the drafter has layers of a kind that isn't supported",
            found=repr(kinds),
            expected=f"a list of {' and '.join(_LAYER_TYPES)}",
            remedy="use a drafter that has only these",
        )
        read.findings.add(error, "layer_types")
        return (_LAYER_TYPES[0],) * layers
    return tuple(kinds)


def _rope(raw: Mapping[str, Any], positions: int, findings: Findings) -> dict[str, Any]:
    try:
        rope = normalised_rope(raw, positions)
        errors: list[ExportError] = [
            UnsupportedModelError(
                problem.what, found=problem.found, expected=problem.expected, remedy=problem.remedy
            )
            for problem in rope_problems(rope, "drafter")
        ]
    except CheckpointError as contradiction:
        errors = [contradiction]
    for error in errors:
        findings.add(error, "rope_parameters")
    return {"rope_type": "default", "rope_theta": 10000.0} if errors else rope


def _check_causality(read: ConfigReader, config: DrafterConfig) -> None:
    """Other readers know ``dflash_config.is_causal`` and ``causal``; the reference doesn't. They have to
    agree.
    """
    for name in ("is_causal", "causal"):
        value = read.optional_flag(name)
        unknown = read.findings.wrong & {"is_causal", "causal", "layer_types", "num_hidden_layers"}
        if value is not None and not unknown and set(config.layer_is_causal) != {value}:
            error = CheckpointError(
                f"{name} contradicts what the reference implementation does with this file",
                found=f"{name} {value}, and per layer {config.layer_is_causal} in the reference",
                expected="the same for all layers: the reference reads only a top-level is_causal",
                remedy="set is_causal at the top level of config.json to what the drafter was trained with",
            )
            read.findings.add(error, name)
