"""Random checkpoints, and ways to export and run them: what the exporter's tests share."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch
import transformers
from dflash.model import DFlashDraftModel
from safetensors.torch import save_file
from torch import nn

from dflash_export.drafters.config import DrafterConfig
from dflash_export.drafters.read import parse_drafter_config
from dflash_rt import Bundle
from dflash_rt.backends.cpu.backend import OnnxRuntimeBackend
from dflash_rt.decoding.loop import decode
from dflash_rt.decoding.sequence import Sequence as Tokens

Array = npt.NDArray[Any]

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 256,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}

# Config class and what makes the family special; every other size comes from `TargetSpec`.
FAMILIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "qwen3": ("Qwen3Config", {}),
    "qwen2": ("Qwen2Config", {}),
    "llama3": ("LlamaConfig", {"rope_parameters": LLAMA3_ROPE}),
    "smollm2": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": 7}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True},
    ),
}


@dataclass(frozen=True)
class TargetSpec:
    """One random target. ``head_dim`` ``None`` leaves the family's own rule: hidden size / heads."""

    family: str
    tied: bool = True
    heads: int = 4
    kv_heads: int = 2
    head_dim: int | None = None
    hidden: int = 32
    layers: int = 3
    vocab: int = 12
    positions: int = 1024
    more: Mapping[str, Any] = field(default_factory=dict)

    def config(self) -> transformers.PreTrainedConfig:
        name, special = FAMILIES[self.family]
        sizes: dict[str, Any] = {
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": 48,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": self.positions,
            "tie_word_embeddings": self.tied,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        }
        if self.head_dim is not None or self.family.startswith("qwen3"):
            sizes["head_dim"] = self.head_dim or self.hidden // self.heads
        return getattr(transformers, name)(**{**sizes, **special, **self.more})


def randomise(module: nn.Module, seed: int, spread: float) -> None:
    """Give every parameter random values, norms and biases too: a neutral one would hide a mistake.

    Drawn with numpy, whose numbers are the same on every machine.
    """
    generator = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            parameter.copy_(_random(name, tuple(parameter.shape), generator, spread))


def _random(name: str, shape: tuple[int, ...], generator: np.random.Generator, spread: float) -> torch.Tensor:
    values = generator.standard_normal(shape)
    is_norm = len(shape) == 1 and "norm" in name
    return torch.from_numpy(1 + 0.2 * values if is_norm else spread * values).float()


def make_target(folder: Path, spec: TargetSpec, *, seed: int = 0, spread: float = 0.2) -> Any:
    """Save a random target with ``save_pretrained``; returns the same model, in eval mode."""
    model = transformers.AutoModelForCausalLM.from_config(spec.config()).eval()
    randomise(model, seed, spread)
    model.save_pretrained(folder)
    return model


def drafter_config(
    target: TargetSpec, *, layers: int = 2, block_size: int = 4, **changes: Any
) -> dict[str, Any]:
    """The object of a config.json as z-lab writes it today. A change to ``None`` removes the key."""
    dflash = {
        "block_size": block_size,
        "mask_token_id": target.vocab - 1,
        "target_layer_ids": [0, target.layers - 1],
    }
    dflash |= changes.pop("dflash_config", {})
    raw: dict[str, Any] = {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "dflash_config": {key: value for key, value in dflash.items() if value is not None},
        "hidden_size": target.hidden,
        "intermediate_size": 40,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": target.vocab,
        "num_target_layers": target.layers,
        "max_position_embeddings": target.positions,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "sliding_window": None,
        "layer_types": ["full_attention"] * layers,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    raw |= changes
    return {key: value for key, value in raw.items() if value is not None}


def old_schema(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The same config as z-lab wrote it first: ``block_size``, ``rope_theta`` and ``rope_scaling`` on top."""
    raw = json.loads(json.dumps(raw))
    rope = raw.pop("rope_parameters")
    raw["rope_theta"] = rope.pop("rope_theta")
    raw["block_size"] = raw["dflash_config"].pop("block_size")
    raw["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    return raw


def make_drafter(
    folder: Path, raw: Mapping[str, Any], *, seed: int = 1, spread: float = 0.2
) -> DrafterConfig:
    """Write config.json and random weights of a drafter."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    config = parse_drafter_config(raw)
    generator = np.random.default_rng(seed)
    shapes = sorted(config.tensor_shapes().items())
    save_file(
        {name: _random(name, shape, generator, spread) for name, shape in shapes},
        folder / "model.safetensors",
    )
    return config


def reference_drafter(folder: Path) -> Any:
    """The drafter as PyPI dflash 0.1.0 loads it."""
    return DFlashDraftModel.from_pretrained(folder, dtype=torch.float32).eval()


@dataclass(frozen=True)
class Run:
    """Tokens of one decoding, and for each step how many drafted tokens were confirmed."""

    token_ids: list[int]
    accepted: list[int]


def run_loop(
    backend: OnnxRuntimeBackend, bundle: Bundle, prompt: Sequence[int], new_tokens: int, width: int
) -> Run:
    """Our own loop, without stop tokens."""
    tokens = Tokens(np.array(prompt, np.int64))
    chunk = bundle.manifest.limits.prefill_chunk
    for _ in decode(backend, tokens, max_new_tokens=new_tokens, verify_len=width, prefill_chunk=chunk):
        pass
    return Run(tokens.new_tokens, tokens.accepted_per_step)


class Graphs:
    """The graphs of a bundle, run one by one over caches that belong to the test."""

    def __init__(self, bundle: Bundle, *, fused: bool = False) -> None:
        self.manifest = bundle.manifest
        paths = {name: bundle.graph_path(name) for name in self.manifest.graphs}
        if fused:
            path = bundle.fused_path("target")
            assert path is not None
            paths["target"] = path
        options = ort.SessionOptions()
        options.log_severity_level = 3  # TensorScatter copies here, and says so
        self.sessions = {
            name: ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            for name, path in paths.items()
        }

    def junk_caches(self, graph: str, batch: int, capacity: int) -> dict[str, Array]:
        """Caches of a graph, full of finite junk: whatever is read before it is written shows."""
        generator = np.random.default_rng(capacity)
        sizes = {"batch": batch, "capacity": capacity}
        return {
            tensor.name: generator.normal(
                0, 30, [d if isinstance(d, int) else sizes[d] for d in tensor.shape]
            ).astype(np.dtype(tensor.dtype))
            for tensor in self.manifest.graphs[graph].inputs
            if "capacity" in tensor.shape
        }

    def grow(self, caches: dict[str, Array], capacity: int) -> None:
        """Move caches into larger ones whose new rows are junk as well."""
        generator = np.random.default_rng(capacity)
        for name, old in caches.items():
            shape = (*old.shape[:2], capacity, old.shape[3])
            caches[name] = generator.normal(0, 30, shape).astype(old.dtype)
            caches[name][:, :, : old.shape[2]] = old

    def run(self, graph: str, caches: dict[str, Array] | None = None, **inputs: Array) -> dict[str, Array]:
        """Outputs by name. Those that alias a cache replace it in ``caches``."""
        spec = self.manifest.graphs[graph]
        feeds = {**inputs, **(caches or {})}
        outputs = [tensor.name for tensor in spec.outputs]
        result = dict(zip(outputs, self.sessions[graph].run(outputs, feeds), strict=True))
        for output, cache in spec.aliases.items():
            assert caches is not None
            caches[cache] = result.pop(output)
        return result

    def target(self, caches: dict[str, Array], token_ids: Array, start: Array) -> dict[str, Array]:
        """``embed``, ``target`` and ``lm_head`` in a row."""
        embeddings = self.run("embed", input_ids=token_ids)["embeddings"]
        result = self.run("target", caches, embeddings=embeddings, start=start)
        return {**result, **self.run("lm_head", hidden=result["hidden"])}
