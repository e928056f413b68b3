"""A DFlash drafter's configuration in the format of vLLM's ``speculators``.

What a value means follows ``speculators/models/dflash`` (config.py, core.py, attention.py) at commit c05b95b:

- ``aux_hidden_state_layer_ids`` count the embedding as 0: id i is the output of layer i - 1;
- a window is counted from the anchor, so that every row of a block sees as many rows before it; in a sliding
  layer the block is causal unless ``sliding_window_non_causal``, in a full one it never is;
- with ``sample_from_anchor`` row k of the block predicts the token at k + 1, the anchor's row included, so
  that ``block_size`` rows draft ``block_size`` tokens;
- embedding and head are the drafter's own, the head over ``draft_vocab_size`` of the target's tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from dflash_export.drafters.config import REMEDY, DrafterConfig, DrafterKind
from dflash_export.drafters.zlab import parse_layers
from dflash_export.errors import CheckpointError, UnsupportedModelError
from dflash_export.graphs.graph import TracedGraph
from dflash_export.graphs.simple import embed_graph, head_graph
from dflash_export.sources.config_reader import ConfigReader, Findings
from dflash_export.sources.weights import Weights
from dflash_rt.errors import Problem

__all__ = ["Speculators"]

_REMEDY = "use the config.json that was published with the drafter"
# The mapping between the drafter's own, smaller vocabulary and the target's.
_MAPPING = ("d2t", "t2d")
_TOLD_BY = frozenset({"speculators_config", "speculators_model_type", "transformer_layer_config"})
# What DFlashSpeculatorConfig has, with the values that a file may leave out.
_DEFAULTS: dict[str, Any] = {
    "block_size": 8,
    "draft_vocab_size": 32000,
    "sample_from_anchor": False,
    "sliding_window_non_causal": False,
    "target_hidden_size": None,
}
_OWN_KEYS = frozenset(
    {
        *_DEFAULTS,
        "aux_hidden_state_layer_ids",
        "mask_token_id",
        "speculators_config",
        "speculators_model_type",
        "speculators_version",
        "transformer_layer_config",
    }
)
# Other readers' names for what transformers calls otherwise, and notes without effect.
_LAYER_KEYS = frozenset({"_attn_implementation", "auto_map", "rope_scaling", "rope_theta", "torch_dtype"})
_TOP_KEYS = frozenset({"auto_map", "bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype"})


@dataclass(frozen=True)
class Speculators(DrafterKind):
    """DFlash with an embedding and a head of its own."""

    name = "speculators"
    told_by = "speculators_model_type 'dflash'"
    format = "the speculators format"
    graph_names = ("draft_embed", "draft_lm_head")
    embedding = "embed_tokens.weight"
    first_layer_id = 1
    not_floats = frozenset(_MAPPING)
    shape_keys = frozenset({"draft_vocab_size"})

    @classmethod
    def matches(cls, raw: Mapping[str, Any]) -> bool:
        return bool(set(raw) & _TOLD_BY)

    @classmethod
    def parse(cls, raw: Mapping[str, Any], findings: Findings) -> DrafterConfig:
        found = raw.get("speculators_model_type")
        if found != "dflash":
            raise UnsupportedModelError(
                "this drafter of the speculators format isn't a DFlash drafter",
                found=f"speculators_model_type {found!r}",
                expected="speculators_model_type 'dflash'",
                remedy=REMEDY,
            )
        return _parse(raw, findings)

    def tensor_shapes(self, config: DrafterConfig) -> dict[str, tuple[int, ...]]:
        hidden, vocab, own = config.hidden_size, config.vocab_size, _own_size(config)
        shapes: dict[str, tuple[int, ...]] = {
            "embed_tokens.weight": (vocab, hidden),
            "lm_head.weight": (own, hidden),
        }
        return shapes if own == vocab else {**shapes, "d2t": (own,), "t2d": (vocab,)}

    def problems(
        self, config: DrafterConfig, target_layers: int, weights: Weights, wrong: Set[str]
    ) -> Iterator[Problem]:
        if "target_layer_ids" not in wrong and target_layers - 1 in config.feature_layers:
            yield Problem(
                "the drafter taps the last layer before the target's final norm",
                f"layer id {target_layers}",
                f"1 to {target_layers - 1}: the graphs tap the last layer behind the norm",
                "use a drafter that taps earlier layers",
            )
        if not wrong & {"draft_vocab_size", "vocab_size"} and (problem := _wrong_mapping(config, weights)):
            yield Problem(*problem, "use the weights that were published with the drafter")

    def graphs(
        self, config: DrafterConfig, drafter: nn.Module, dtype: ir.DataType
    ) -> Iterator[tuple[str, TracedGraph]]:
        """``draft_embed`` and ``draft_lm_head``."""
        vocab, hidden, own = config.vocab_size, config.hidden_size, _own_size(config)
        yield "draft_embed", embed_graph(vocab, hidden, dtype, "embed_tokens.weight")
        yield "draft_lm_head", head_graph(own, hidden, dtype, "lm_head.weight", maps_ids=own != vocab)

    def load(
        self, config: DrafterConfig, weights: Weights, parameter: str, dtype: torch.dtype
    ) -> torch.Tensor:
        """``target_ids`` is computed from the mapping."""
        if parameter == "target_ids":
            return _target_ids(config, weights)
        return super().load(config, weights, parameter, dtype)


def _own_size(config: DrafterConfig) -> int:
    assert config.draft_vocab_size is not None
    return config.draft_vocab_size


def _parse(raw: Mapping[str, Any], findings: Findings) -> DrafterConfig:
    from transformers import PreTrainedConfig

    known = _OWN_KEYS | _TOP_KEYS | set(PreTrainedConfig().to_dict())
    _refuse_unknown("the drafter's config.json", raw, known)
    read = ConfigReader({**_DEFAULTS, **raw}, frozenset(), findings)
    layers = _layer_config(read)
    _check_proposals(read)
    samples_from_anchor = read.flag("sample_from_anchor")
    body = parse_layers(
        {
            **layers,
            "num_target_layers": 1,  # not in the file
            # The anchor is one row of the block that is verified, whether or not its row drafts.
            "block_size": read.count("block_size") + samples_from_anchor,
            "mask_token_id": read.index("mask_token_id"),
            "dflash_config": {"target_layer_ids": list(_feature_layers(read))},
            "is_causal": False if read.flag("sliding_window_non_causal") else None,
        },
        findings,
        lambda _: Speculators(),
    )
    width = read.raw("target_hidden_size")
    if width is not None and width != body.hidden_size and "hidden_size" not in findings.wrong:
        error = UnsupportedModelError(
            "the drafter is of another width than its target",
            found=f"target_hidden_size {width!r}, hidden_size {body.hidden_size}",
            expected="the same",
            remedy="use a drafter that is as wide as its target",
        )
        findings.add(error, "target_hidden_size")
    return dataclasses.replace(
        body,
        num_target_layers=None,
        draft_vocab_size=read.count("draft_vocab_size"),
        samples_from_anchor=samples_from_anchor,
        window_from_anchor=True,
    )


def _layer_config(read: ConfigReader) -> dict[str, Any]:
    """``transformer_layer_config`` with the values that it leaves out, which are ``Qwen3Config``'s own."""
    from transformers import Qwen3Config

    layers = read.raw("transformer_layer_config")
    if "transformer_layer_config" in read.findings.wrong:
        raise read.findings.errors.pop()  # without layers there is nothing more to read
    if not isinstance(layers, Mapping):
        raise CheckpointError(
            "transformer_layer_config in the drafter's config.json is wrong",
            found=repr(layers),
            expected="an object",
            remedy=_REMEDY,
        )
    if layers.get("model_type", "qwen3") != "qwen3":
        raise UnsupportedModelError(
            "the drafter's layers are of a kind that isn't supported",
            found=f"model_type {layers['model_type']!r} in transformer_layer_config",
            expected="model_type 'qwen3'",
            remedy="use a drafter with Qwen3 layers",
        )
    defaults = Qwen3Config().to_dict()
    _refuse_unknown("transformer_layer_config", layers, _LAYER_KEYS | set(defaults))
    # Those two follow from others, and the default of the one is a default for 32 layers.
    derived = ("layer_types", "rope_parameters")
    return {**{key: value for key, value in defaults.items() if key not in derived}, **_with_theta(layers)}


def _with_theta(layers: Mapping[str, Any]) -> dict[str, Any]:
    if any(layers.get(key) for key in ("rope_parameters", "rope_scaling", "rope_theta")):
        return dict(layers)
    return {**layers, "rope_theta": 10000.0}  # Qwen3Config's own


def _feature_layers(read: ConfigReader) -> tuple[int, ...]:
    ids = read.indices("aux_hidden_state_layer_ids", ())
    if not ids:
        read.findings.wrong.add("target_layer_ids")
        return (0,)
    if 0 in ids:
        error = UnsupportedModelError(
            "the drafter taps the target's embedding",
            found=f"aux_hidden_state_layer_ids {list(ids)}, of which 0 is the embedding",
            expected="ids from 1: the output of the first layer",
            remedy="use a drafter that taps layers only",
        )
        read.findings.add(error, "target_layer_ids")
        return (0,)
    return tuple(layer - 1 for layer in ids)


def _check_proposals(read: ConfigReader) -> None:
    """``speculators_config`` says how the drafter is meant to be run: it has to be greedy DFlash."""
    config = read.raw("speculators_config", None)
    if config is None:
        return
    algorithm = config.get("algorithm", "dflash") if isinstance(config, Mapping) else config
    methods = config.get("proposal_methods", []) if isinstance(config, Mapping) else []
    kinds = [item.get("proposal_type") if isinstance(item, Mapping) else item for item in methods]
    if algorithm != "dflash" or any(kind != "greedy" for kind in kinds):
        raise UnsupportedModelError(
            "the drafter is meant to be run in another way",
            found=f"algorithm {algorithm!r} with proposals {kinds}",
            expected="algorithm 'dflash' with greedy proposals",
            remedy=_REMEDY,
        )


def _refuse_unknown(where: str, found: Mapping[str, Any], known: Set[str]) -> None:
    if unknown := sorted(set(found) - known):
        raise CheckpointError(
            f"{where} has keys that aren't known",
            found=", ".join(unknown),
            expected="keys of DFlashSpeculatorConfig and of transformers' configs",
            remedy="remove a key from config.json only if it has no effect on the model",
        )


def _target_ids(drafter: DrafterConfig, weights: Weights) -> torch.Tensor:
    """int64 ``[draft_vocab_size]``: the target's id of each token that the drafter can propose.

    ``d2t`` is stored as an offset: token i of the drafter is token ``i + d2t[i]`` of the target.
    """
    size = _own_size(drafter)
    own = torch.arange(size)
    return own if size == drafter.vocab_size else own + weights.rows("d2t", 0, size)


def _wrong_mapping(drafter: DrafterConfig, weights: Weights) -> tuple[str, str, str] | None:
    """Why the mapping can't be used: what, found, expected. Missing tensors and wrong shapes are reported
    elsewhere.
    """
    own, vocab = _own_size(drafter), drafter.vocab_size
    if own > vocab:
        what = "the drafter's vocabulary is larger than the target's"
        return what, f"draft_vocab_size {own}", f"at most {vocab}"
    names, shapes = set(weights.names()), drafter.tensor_shapes()
    if own == vocab or any(name not in names or weights.shape(name) != shapes[name] for name in _MAPPING):
        return None
    dtypes = {name: weights.dtype(name) for name in _MAPPING}
    if dtypes != {"d2t": torch.int64, "t2d": torch.bool}:
        found = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        return "the drafter's vocabulary mapping has other dtypes", found, "d2t torch.int64, t2d torch.bool"
    ids = _target_ids(drafter, weights)
    outside = ids[(ids < 0) | (ids >= vocab)]
    if outside.numel():
        found = f"{outside.numel()} ids such as {int(outside[0])}"
        expected = f"0 to {vocab - 1}, each as i + d2t[i]"
        return "the drafter maps to tokens that the target doesn't have", found, expected
    marked = torch.zeros(vocab, dtype=torch.bool)
    marked[ids] = True
    if not torch.equal(marked, weights.rows("t2d", 0, vocab)) or int(marked.sum()) != own:
        what = "the drafter's vocabulary mappings contradict each other"
        found = f"{int(marked.sum())} different tokens behind d2t, others than those that t2d marks"
        return what, found, f"{own} tokens, the same in both"
    return None
