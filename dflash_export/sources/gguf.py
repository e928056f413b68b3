"""Reading a GGUF target one tensor at a time.

Names and row orders come from transformers' own ``modeling_gguf_pytorch_utils`` (the map from GGUF to module
names, and the processors that undo llama.cpp's permutation of q and k), so that a tensor here is bit for bit
what ``AutoModelForCausalLM.from_pretrained(folder, gguf_file=...)`` loads.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dflash_export.errors import CheckpointError, UnsupportedModelError
from dflash_export.sources.files import cannot_read
from dflash_export.sources.weights import Weights, closed_error, empty_model, missing_error

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["GgufWeights", "check_gguf_file", "open_reader"]

_MAGIC = b"GGUF"
# What numpy and struct raise inside the reader when a file ends early or its header is nonsense.
_READER_ERRORS = (ValueError, IndexError, KeyError, TypeError, OverflowError, OSError, MemoryError)


class GgufWeights(Weights):
    """The tensors of one ``.gguf`` file under transformers' names. Tensors it doesn't know keep their own
    names.
    """

    def __init__(self, path: Path, config: PreTrainedConfig) -> None:
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
        )

        self._path = path
        reader = open_reader(path)
        _refuse_unread_rope(reader)
        architecture = reader.get_field("general.architecture")
        name = "" if architecture is None else str(architecture.contents())
        processor: Any = TENSOR_PROCESSORS.get(name, TensorProcessor)
        self._processor = processor(config=config.to_dict())
        model = empty_model(config)
        self._module_shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        self._map: dict[str, str] = get_gguf_hf_weights_map(_WholeModel(model), self._processor)
        self._parts: dict[str, list[Any]] | None = {}
        for tensor in reader.tensors:
            self._parts.setdefault(self._module_name(tensor.name), []).append(tensor)
        self._names = sorted(self._parts)
        for tensor in {tensor.tensor_type: tensor for tensor in reader.tensors}.values():
            _dequantize(tensor, slice(0, 1))  # each type once: one that can't be read is refused right here

    def names(self) -> list[str]:
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        parts = self._tensors(name)
        shape = tuple(int(axis) for axis in reversed(parts[0].shape))  # GGUF lists the fastest axis first
        if len(parts) == 2:  # the experts' gate and up, stacked by the processor
            return (shape[0], 2 * shape[1], *shape[2:])
        expected = self._module_shapes.get(name)
        # A processor may add an axis of length 1; anything else stays visible as a mismatch.
        return expected if expected is not None and _without_ones(expected) == _without_ones(shape) else shape

    def dtype(self, name: str) -> torch.dtype:
        self._tensors(name)
        return torch.float32  # what gguf.dequantize gives for every type that it knows

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        tensors = self._tensors(name)
        if len(tensors) == 1 and tensors[0].name == "token_embd.weight":
            return _own(_dequantize(tensors[0], slice(start, stop)))
        return self._read(name)[start:stop].clone()

    def close(self) -> None:
        self._parts = None

    def _read(self, name: str) -> torch.Tensor:
        parsed: dict[str, Any] = {"tensors": {}}
        for tensor in self._tensors(name):
            result = self._processor.process(
                weights=_dequantize(tensor, slice(None)),
                name=tensor.name,
                tensor_key_mapping=self._map,
                parsed_parameters=parsed,
            )
            if result.name is not None:  # None: the processor has put the result into `parsed` itself
                return _own(result.weights)
        stacked: torch.Tensor = parsed["tensors"][name]
        return stacked.contiguous()

    def _module_name(self, name: str) -> str:
        # The processors of mixtures leave ".weight" off the names of stacked experts.
        mapped: str = self._map.get(name) or self._map.get(name.removesuffix(".weight")) or name
        return mapped

    def _tensors(self, name: str) -> list[Any]:
        if self._parts is None:
            raise closed_error()
        if name not in self._parts:
            found = f"{len(self._names)} other tensors in {self._path.name}"
            remedy = "use a whole GGUF file of a supported family, or the safetensors checkpoint"
            raise missing_error(name, found, remedy)
        return self._parts[name]


def check_gguf_file(path: Path) -> None:
    """Check what can be seen without parsing: that the file starts as GGUF does.

    Raises :class:`~dflash_export.errors.CheckpointError`.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise cannot_read(path, error) from error
    if magic != _MAGIC:
        raise CheckpointError(
            f"{path.name} is not a GGUF file",
            found=f"{size:,} bytes that start with {magic!r}",
            expected=f"a file that starts with {_MAGIC!r}",
            remedy="download it again; a file of about 130 bytes is a Git LFS pointer: run git lfs pull",
        )


def open_reader(path: Path) -> Any:
    """A ``gguf.GGUFReader`` over the mapped file.

    Raises :class:`~dflash_export.errors.CheckpointError` when the file isn't GGUF, is truncated, or is one of
    several.
    """
    from gguf import GGUFReader

    check_gguf_file(path)
    size = path.stat().st_size
    try:
        reader = GGUFReader(path)
    except _READER_ERRORS as error:
        raise CheckpointError(
            f"{path.name} is truncated or damaged",
            found=f"{size:,} bytes; the reader says: {error}",
            expected="a whole GGUF file",
            remedy="download the file again and compare its size with the published one",
        ) from error
    split = reader.get_field("split.count")
    if split is not None and int(split.contents()) > 1:
        raise CheckpointError(
            f"{path.name} is one part of a split GGUF model",
            found=f"part of {int(split.contents())}",
            expected="one file with all tensors",
            remedy="merge the parts with llama.cpp's gguf-split --merge",
        )
    return reader


def _refuse_unread_rope(reader: Any) -> None:
    """transformers reads only ``rope.freq_base``: scaling in other fields would be lost without a word."""
    scaling = [
        f"{key} = {field.contents()}"
        for key, field in reader.fields.items()
        if ".rope.scal" in key and not (key.endswith(".type") and field.contents() == "none")
    ]
    tensors = [tensor.name for tensor in reader.tensors if tensor.name.startswith("rope_")]
    if scaling or tensors:
        raise UnsupportedModelError(
            "this GGUF file scales RoPE, which transformers doesn't read from GGUF",
            found=", ".join(scaling + tensors),
            expected="plain RoPE; the result would be wrong at every position otherwise",
            remedy="export the safetensors checkpoint of the same model",
        )


def _dequantize(tensor: Any, rows: slice) -> Any:
    from gguf import dequantize

    try:
        return dequantize(tensor.data[rows], tensor.tensor_type)
    except NotImplementedError as error:
        raise CheckpointError(
            f"tensor {tensor.name} is quantised in a way that can't be read",
            found=tensor.tensor_type.name,
            expected="a type that the gguf package dequantises",
            remedy="upgrade the gguf package, or use another file of the same model",
        ) from error


def _own(array: Any) -> torch.Tensor:
    # "W" copies what is still a view of the mapped file, and only that; "E" drops numpy's memmap subclass.
    return torch.from_numpy(np.require(array, requirements=["C", "W", "E"]))


class _WholeModel:
    """A module whose children aren't visited: its own state dict has every name already.

    transformers' map visits every submodule and rebuilds gguf's table of names each time: that takes seconds.
    """

    def __init__(self, model: Any) -> None:
        self.config = model.config
        self.state_dict = model.state_dict

    def named_children(self) -> tuple[()]:
        return ()


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(axis for axis in shape if axis != 1)
