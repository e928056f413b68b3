"""Tensors of a checkpoint, read one at a time.

A model is never held whole: an export asks for one tensor, writes it into the bundle and lets it go. Names
are those of the transformers module, so that ``names()`` can be compared with ``module.state_dict()``:

- per-expert matrices of a mixture (``mlp.experts.{e}.gate_proj.weight`` and so on) appear as the two stacked
  tensors of the module, ``mlp.experts.gate_up_proj`` and ``mlp.experts.down_proj``;
- GGUF tensors appear under the names, and in the row order, that transformers gives them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Self

import torch

from dflash_export.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["Weights", "closed_error", "empty_model", "missing_error"]

_CHECKED_AT_ONCE = 1 << 22  # numbers


class Weights(ABC):
    """A checkpoint that is open for reading. Close it, or use it as a context manager.

    What it returns is a copy in ordinary memory that belongs to the caller.
    """

    @abstractmethod
    def names(self) -> list[str]:
        """Names of all tensors, sorted."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, without reading it. Raises ``CheckpointError`` when there is none of that
        name.
        """

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of one tensor; float32 for what GGUF stores quantised."""

    @abstractmethod
    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows ``[start, stop)`` of the first axis, in the stored dtype.

        Reads no more than these rows of a matrix that is stored as one piece, such as an embedding.
        """

    @abstractmethod
    def close(self) -> None:
        """Release the files. Safe to call twice; reading afterwards raises ``CheckpointError``."""

    @abstractmethod
    def _read(self, name: str) -> torch.Tensor:
        """The whole tensor in its stored dtype."""

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors in the dtypes that :meth:`dtype` gives: what the model takes when loaded."""
        total = 0
        for name in self.names():
            total += torch.Size(self.shape(name)).numel() * self.dtype(name).itemsize
        return total

    def load(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Read one tensor as ``dtype``: contiguous, on the CPU, every value finite.

        Raises ``CheckpointError`` when it is missing, isn't floating-point, holds NaN
        or infinity, or holds values too large for ``dtype``.
        """
        stored = self.dtype(name)
        if not stored.is_floating_point or stored.itemsize < 2:
            raise CheckpointError(
                f"tensor {name} is not stored in floating point",
                found=stored,
                expected="float32, float16 or bfloat16",
                remedy="use the checkpoint that was not quantised",
            )
        tensor = self._read(name)
        if not _all_finite(tensor):
            raise CheckpointError(
                f"tensor {name} holds values that are not finite",
                found=f"{int((~torch.isfinite(tensor)).sum())} of {tensor.numel()} are NaN or infinite",
                expected="finite numbers only",
                remedy="download the checkpoint again; if it stays so, it is broken at its origin",
            )
        if tensor.dtype == dtype:
            return tensor
        converted = tensor.to(dtype)
        if not _all_finite(converted):
            raise CheckpointError(
                f"tensor {name} doesn't fit {dtype}",
                found=f"a value of magnitude {float(tensor.abs().max()):.4g}",
                expected=f"at most {torch.finfo(dtype).max:.4g}",
                remedy="export with precision bf16 or fp32",
            )
        return converted

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _all_finite(tensor: torch.Tensor) -> bool:
    # In pieces: isfinite() of a whole vocabulary matrix would take another quarter to half of its size.
    flat = tensor.reshape(-1)
    return all(
        bool(torch.isfinite(flat[start : start + _CHECKED_AT_ONCE]).all())
        for start in range(0, flat.numel(), _CHECKED_AT_ONCE)
    )


def closed_error() -> CheckpointError:
    """What reading after ``close()`` raises."""
    return CheckpointError(
        "the checkpoint was closed",
        found="a read after close()",
        expected="reads while it is open",
        remedy="open it again",
    )


def missing_error(name: str, found: str, remedy: str) -> CheckpointError:
    """What asking for a tensor that the checkpoint doesn't hold raises."""
    return CheckpointError(
        f"the checkpoint has no tensor {name}",
        found=found,
        expected="every tensor of the model",
        remedy=remedy,
    )


def empty_model(config: PreTrainedConfig) -> Any:
    """The module of transformers, without memory for its weights."""
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM  # it has no annotations
    with torch.device("meta"):
        return auto.from_config(config)
