"""Models of a shape with random weights: checkpoints, bundles with engines, and PyTorch's modules."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from dflash_bench.budget import SkippedError
from dflash_bench.gpu.shapes import PairShape
from dflash_export import build, compile_engines
from dflash_export.drafters.read import parse_drafter_config
from dflash_export.engines.devices import present_gpu
from dflash_export.engines.vendor import BACKENDS as ENGINE_BACKENDS
from dflash_export.progress import Progress
from dflash_rt import Bundle

__all__ = [
    "DTYPES",
    "Made",
    "checkpoint_bytes",
    "compile_for",
    "drafter_tensors",
    "is_made",
    "load_random_drafter",
    "load_random_target",
    "make_bundle",
    "seconds_to_make",
    "target_tensors",
    "write_pair",
]

Shapes = dict[str, tuple[int, ...]]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# Guesses for planning, on the careful side: no measurement behind them.
_EXPORT_SECONDS, _EXPORT_SECONDS_A_GB = 20.0, 4.0
_COMPILE_SECONDS, _COMPILE_SECONDS_A_GB = 15.0, 5.0

# Calibrated on next to nothing: the scales of random weights mean nothing, only their places count.
_FP8 = {
    "precision": "bf16",
    "quantize": "fp8",
    "calib_limit": 1,
    "calib_tokens": 4,
    "measure_quantization": False,
}

# Drawing billions of normal numbers takes minutes on a CPU. Each tensor instead repeats one block of them,
# from a place of its own, so that no two tensors and no two products are alike.
_BLOCK = 1 << 24
_SHARD_BYTES = 1 << 31  # only that much is in memory at once
_PRIME = 7919  # step between the places at which tensors begin


@dataclass(frozen=True)
class Made:
    """A bundle, and the checkpoints that it was built from while they are kept."""

    bundle: Bundle
    target: Path
    drafter: Path


def seconds_to_make(shape: PairShape, precision: str, *, engines: bool) -> float:
    """How long export and engines may take."""
    size = checkpoint_bytes(shape, DTYPES.get(precision, torch.bfloat16)) / 1e9
    seconds = _EXPORT_SECONDS + size * _EXPORT_SECONDS_A_GB
    return seconds + (_COMPILE_SECONDS + size * _COMPILE_SECONDS_A_GB if engines else 0)


def make_bundle(
    shape: PairShape,
    precision: str,
    scratch: Path,
    *,
    max_seq_len: int,
    keep_weights: bool = False,
    progress: Progress | None = None,
) -> Made:
    """Export random weights of a shape. One that is in ``scratch`` already is taken as it is.

    The checkpoints' weights are removed afterwards unless ``keep_weights``: a bundle has them all, and a
    large pair is there twice otherwise. ``precision`` is one of ``shapes.PRECISIONS``.

    Raises:
        SkippedError: the disk is too full.
        DFlashError: as :func:`dflash_export.build` does.
    """
    options: dict[str, Any] = {"name": shape.name, "max_seq_len": max_seq_len, "precision": precision}
    if precision == "fp8":
        options |= _FP8
    dtype = DTYPES[options["precision"]]
    folder = _folder(shape, precision, scratch, max_seq_len)
    target, drafter, output = folder / "target", folder / "drafter", folder / "bundle"
    if output.is_dir() and (not keep_weights or list(target.glob("*.safetensors"))):
        return Made(Bundle.open(output), target, drafter)
    shutil.rmtree(folder, ignore_errors=True)
    scratch.mkdir(parents=True, exist_ok=True)
    free, needed = shutil.disk_usage(scratch).free, 2 * checkpoint_bytes(shape, dtype)
    if free < needed:
        raise SkippedError(
            f"the disk is too full: {free / 1e9:.1f} GB free in {scratch}, {needed / 1e9:.1f} GB needed"
        )
    write_pair(shape, folder, dtype)
    bundle = build(target, drafter, output, progress=progress, **options)
    if not keep_weights:
        for path in (*target.glob("*.safetensors"), *drafter.glob("*.safetensors")):
            path.unlink()
    return Made(bundle, target, drafter)


def is_made(shape: PairShape, precision: str, scratch: Path, max_seq_len: int) -> bool:
    """Whether :func:`make_bundle` would find it there."""
    return (_folder(shape, precision, scratch, max_seq_len) / "bundle").is_dir()


def compile_for(backend: str, bundle: Bundle, *, progress: Progress | None = None) -> None:
    """Build the engines that ``backend`` needs: none if it runs the graphs themselves.

    Raises DFlashError as :func:`dflash_export.compile_engines` does: also for a GPU that TensorRT-RTX can't
    build for, which is asked for by its compute capability.
    """
    if backend in ENGINE_BACKENDS:
        gpu = present_gpu()
        targets = () if backend == "tensorrt" or gpu is None else (gpu.compute_capability,)
        compile_engines(bundle, backend=backend, compute_capabilities=targets, progress=progress)


def target_tensors(shape: PairShape) -> Shapes:
    """Names and shapes of the target's checkpoint, as transformers names them; no memory is taken."""
    with torch.device("meta"):
        model: Any = Qwen3ForCausalLM(Qwen3Config(**shape.target_config()))
    # Parameters, not the state dict: that has a tied embedding twice.
    return {name: tuple(value.shape) for name, value in model.named_parameters()}


def drafter_tensors(shape: PairShape) -> Shapes:
    """The same of the drafter's."""
    return parse_drafter_config(shape.drafter_config()).tensor_shapes()


def checkpoint_bytes(shape: PairShape, dtype: torch.dtype) -> int:
    """Bytes of both checkpoints."""
    shapes = [*target_tensors(shape).values(), *drafter_tensors(shape).values()]
    return sum(torch.Size(size).numel() for size in shapes) * dtype.itemsize


def write_pair(shape: PairShape, folder: Path, dtype: torch.dtype, *, seed: int = 0) -> tuple[Path, Path]:
    """Write ``folder/target`` and ``folder/drafter``, config.json and weights; returns both.

    Norms are near 1, matrices have the standard deviation ``shape.spread``.
    """
    target, drafter = folder / "target", folder / "drafter"
    block = torch.randn(_BLOCK, generator=torch.Generator().manual_seed(seed))
    _write(target, shape.target_config(), target_tensors(shape), block, shape.spread, dtype)
    _write(drafter, shape.drafter_config(), drafter_tensors(shape), block.flip(0), shape.spread, dtype)
    return target, drafter


def load_random_target(shape: PairShape, dtype: torch.dtype, device: str) -> Any:
    """The target's module with weights drawn on the device; for its speed, not for its tokens."""
    with torch.device(device):
        config = Qwen3Config(**shape.target_config())
        model: Any = Qwen3ForCausalLM._from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    return model.eval()


def load_random_drafter(shape: PairShape, dtype: torch.dtype, device: str) -> Any:
    """The reference's own drafter module, likewise."""
    module = importlib.import_module("dflash.model")
    # Through JSON, as from a file: the reference reads values of the config by name.
    config = Qwen3Config(**json.loads(json.dumps(shape.drafter_config())))
    with torch.device(device):
        return module.DFlashDraftModel(config).to(dtype).eval()


def _folder(shape: PairShape, precision: str, scratch: Path, max_seq_len: int) -> Path:
    return scratch / f"{shape.name}-{precision}-{max_seq_len}"


def _write(
    folder: Path,
    config: Mapping[str, Any],
    shapes: Shapes,
    block: torch.Tensor,
    spread: float,
    dtype: torch.dtype,
) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    matrices, norms = (block * spread).to(dtype), (1 + 0.2 * block).to(dtype)
    numbers = {name: number for number, name in enumerate(sorted(shapes))}
    empty = {name: torch.empty(size, dtype=dtype, device="meta") for name, size in shapes.items()}
    split = split_torch_state_dict_into_shards(empty, max_shard_size=_SHARD_BYTES)
    for file, names in split.filename_to_tensors.items():
        tensors = {
            name: _repeat(norms if len(shapes[name]) == 1 else matrices, shapes[name], numbers[name])
            for name in names
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _repeat(block: torch.Tensor, shape: tuple[int, ...], number: int) -> torch.Tensor:
    count = torch.Size(shape).numel()
    first = number * _PRIME % _BLOCK
    begin = block[first : first + count]
    blocks, rest = divmod(count - len(begin), _BLOCK)
    return torch.cat([begin, *[block] * blocks, block[:rest]]).view(shape)
