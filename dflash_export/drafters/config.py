"""A drafter's configuration, the same whatever format it was read from, and what a kind of drafter is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from dflash_export.errors import CheckpointError

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch
    from torch import nn
    from transformers import Qwen3Config

    from dflash_export.graphs.graph import TracedGraph
    from dflash_export.sources.config_reader import Findings
    from dflash_export.sources.weights import Weights
    from dflash_rt.errors import Problem

__all__ = ["REMEDY", "DrafterConfig", "DrafterKind"]

REMEDY = "use a DFlash or DFlash 2 drafter in z-lab's format, or a DFlash drafter in the speculators format"


@dataclass(frozen=True)
class DrafterKind(ABC):
    """What one kind of drafter has besides a block's layers; an instance holds the settings of one drafter.

    A subclass is a new kind: a file of its own, listed in read.py.
    """

    name: ClassVar[Literal["dflash-v1", "dflash-v2", "speculators"]]
    """As the manifest has it."""
    told_by: ClassVar[str]
    """What a config.json of this kind holds, for messages."""
    format: ClassVar[str] = "z-lab's format"
    reference_class: ClassVar[str | None] = None
    """Name of its class in PyPI ``dflash``; None if that can't load it."""
    graph_names: ClassVar[tuple[str, ...]] = ()
    """Graphs that :meth:`graphs` makes, in order."""
    embedding: ClassVar[str | None] = None
    """Tensor of its own embedding; None if it uses the target's."""
    first_layer_id: ClassVar[int] = 0
    """Id of the target's first layer in its config.json."""
    not_floats: ClassVar[frozenset[str]] = frozenset()
    """Tensors that aren't numbers to compute with."""
    shape_keys: ClassVar[frozenset[str]] = frozenset()
    """Values of config.json that shapes of its own tensors follow from."""

    @classmethod
    @abstractmethod
    def matches(cls, raw: Mapping[str, Any]) -> bool:
        """Whether a config.json describes a drafter of this kind."""

    @classmethod
    @abstractmethod
    def parse(cls, raw: Mapping[str, Any], findings: Findings) -> DrafterConfig:
        """Read a config.json that :meth:`matches`; what is wrong with it is added to ``findings``.

        Raises:
            CheckpointError, UnsupportedModelError: reading can't go on.
        """

    @property
    def selector_top_k(self) -> int | None:
        """Candidates of each row among which the drafter chooses; None if it takes the best token."""
        return None

    def tensor_shapes(self, config: DrafterConfig) -> dict[str, tuple[int, ...]]:
        """Name and shape of the tensors that only this kind has."""
        return {}

    def problems(
        self, config: DrafterConfig, target_layers: int, weights: Weights, wrong: Set[str]
    ) -> Iterator[Problem]:
        """What only this kind can have wrong, for a target of so many layers.

        ``wrong`` names values of config.json that others stand in for: nothing is said about those.
        """
        return iter(())

    def layer_modules(self, config: DrafterConfig) -> dict[str, nn.Module]:
        """Modules of its own in each layer, by name.

        ``attention_conv`` and ``mlp_conv`` wrap the two halves of the layer: ``prepare(input)`` gives the
        half's input and something to keep, ``finish(output, kept)`` its output.
        """
        return {}

    def modules(self, config: DrafterConfig) -> dict[str, nn.Module]:
        """Modules of its own beside the layers, by name."""
        return {}

    def graphs(
        self, config: DrafterConfig, drafter: nn.Module, dtype: ir.DataType
    ) -> Iterator[tuple[str, TracedGraph]]:
        """The graphs of :attr:`graph_names`. ``drafter`` has the modules above. Parameters are named as in
        the checkpoint, those of ``drafter`` below ``drafter.``.
        """
        return iter(())

    def load(
        self, config: DrafterConfig, weights: Weights, parameter: str, dtype: torch.dtype
    ) -> torch.Tensor:
        """The data of a parameter of :meth:`graphs`."""
        return weights.load(parameter, dtype)


@dataclass(frozen=True)
class DrafterConfig:
    """One drafter, of whatever kind; ``kind`` holds what only drafters of its kind have.

    Sizes are counts; ``block_size`` counts the anchor row, so ``block_size - 1`` tokens are drafted.
    ``feature_layers`` are 0-based target layers whose output is tapped (z-lab's ``target_layer_ids``).
    ``sliding_window`` is ``None`` when ``use_sliding_window`` is false, as ``Qwen3Config`` has it: a layer of
    type ``sliding_attention`` is then causal and sees everything before it. ``is_causal`` is the file's own
    setting for all layers, ``None`` where it has none; see :attr:`layer_is_causal`. ``rope_parameters`` are
    in transformers 5's form. The three factors are neutral at 1, 1 and ``None``.

    ``draft_vocab_size`` are the rows of the drafter's own head (``None``: it uses the target's).
    ``samples_from_anchor`` says that the anchor's row drafts too, and ``block_size`` is then one more than
    the rows of a draft pass. ``window_from_anchor`` counts windows from the anchor.
    """

    kind: DrafterKind
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
        """Names of the graphs that only some drafters have, in the order in which they are made."""
        return (*self.kind.graph_names, *(("draft_logits",) if self.has_logit_transform else ()))

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
        return shapes | self.kind.tensor_shapes(self)

    def to_qwen3_config(self) -> Qwen3Config:
        """The ``Qwen3Config`` for building the modules that are traced.

        Raises :class:`~dflash_export.errors.CheckpointError` when transformers refuses the values.
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
