"""Checkpoints of a run: float32 weights, AdamW's moments and the counts, in one safetensors file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dflash_export.errors import CheckpointError, RecipeError
from dflash_rt.errors import OutputError

__all__ = ["load_state", "save_state"]

_MOMENTS = ("exp_avg", "exp_avg_sq")


def save_state(
    path: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    counts: Mapping[str, Any],
    *,
    run: str,
) -> None:
    """Write everything that going on needs, under a temporary name first. ``run`` says which run it is.

    Raises OutputError when it can't be written.
    """
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"weight.{name}"] = parameter.detach()
        moments = optimizer.state[parameter]
        tensors |= {f"{moment}.{name}": moments[moment] for moment in _MOMENTS if moment in moments}
    partial = path.with_suffix(".partial")
    try:
        on_cpu = {name: value.contiguous().cpu() for name, value in tensors.items()}
        save_file(on_cpu, partial, {"counts": json.dumps(counts), "run": run})
        os.replace(partial, path)
    except OSError as error:
        raise OutputError(
            f"can't write the checkpoint {path}",
            found=error,
            expected="a writable folder with room for three times the float32 weights",
            remedy="free disk space and run the command again",
        ) from error


def load_state(
    path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, *, run: str
) -> dict[str, Any]:
    """Put weights and moments back; returns the counts.

    Raises CheckpointError when the file can't be read and RecipeError when it is of another run.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        counts: dict[str, Any] = json.loads(metadata["counts"])
        found = metadata["run"]
    except Exception as error:  # safetensors' own error, KeyError, TypeError and others, by what is damaged
        raise CheckpointError(
            f"the checkpoint {path} can't be read",
            found=error,
            expected="a checkpoint of this command",
            remedy="delete it to begin again",
        ) from error
    if found != run:
        raise RecipeError(
            f"{path} is of another run",
            found=_difference(run, found),
            expected=_difference(found, run),
            remedy="repeat that run's options and data to go on, or choose another output folder",
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"weight.{name}"])
            if f"{_MOMENTS[0]}.{name}" in tensors:
                moments = {moment: tensors[f"{moment}.{name}"].to(parameter.device) for moment in _MOMENTS}
                # The fused optimizer keeps its count of steps on the device.
                where = parameter.device if parameter.device.type == "cuda" else torch.device("cpu")
                moments["step"] = torch.tensor(float(counts["step"]), device=where)
                optimizer.state[parameter] = moments
    return counts


def _difference(run: str, other: str) -> str:
    own, theirs = json.loads(run), json.loads(other)
    return ", ".join(f"{key} {own.get(key)}" for key in sorted(own) if own.get(key) != theirs.get(key))
