"""The floor of a step: no step can be faster than reading the weights that it uses from memory.

A row more costs no further byte, only arithmetic, so this is a floor and not an estimate: one row comes
near it, and the more rows a pass has the more its arithmetic counts.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dflash_rt.errors import IntegrityError

if TYPE_CHECKING:
    from dflash_rt.bundle import Bundle

__all__ = ["StepFloor", "measure_read_bandwidth", "step_floor", "weight_bytes"]

_PROBE_BYTES = 512 * 2**20
_PROBE_ROUNDS = 8


@dataclass(frozen=True)
class StepFloor:
    """What one step reads and computes at least.

    Attributes:
        weight_bytes: bytes of the weights that are used; one used twice is read twice.
        operations: multiplications and additions of its matrix products.
        bytes_per_second: what memory delivers.
    """

    weight_bytes: int
    operations: int
    bytes_per_second: float

    @property
    def milliseconds(self) -> float:
        """Time in which memory delivers the weights: no step is faster."""
        return 1e3 * self.weight_bytes / self.bytes_per_second


def measure_read_bandwidth(threads: int, *, size: int = _PROBE_BYTES, rounds: int = _PROBE_ROUNDS) -> float:
    """Bytes per second that ``threads`` threads read from memory together; the best of ``rounds``.

    Each thread takes the maximum of its part of an int32 array of ``size`` bytes, which one core does faster
    than memory delivers. Nothing else of the machine is measured: caches are smaller than the array.
    """
    parts = np.array_split(np.ones(size // 4, np.int32), threads)
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(rounds):
            began = time.perf_counter()
            list(pool.map(np.max, parts))
            best = min(best, time.perf_counter() - began)
    return sum(part.nbytes for part in parts) / best


def step_floor(bundle: Bundle, width: int, bytes_per_second: float) -> StepFloor | None:
    """The floor of a step of ``width`` rows; ``None`` where it depends on the data or weights are quantised.

    A plain step (width 1) reads the target and the head, a drafted one also ``inject``, ``draft`` and the
    head once more. The embedding is a lookup of a few rows and isn't counted. In a mixture of experts the
    rows decide which experts are read.

    Raises:
        IntegrityError: a graph's file can't be read as ONNX.
    """
    manifest = bundle.manifest
    if "moe" in manifest.target.model_type:
        return None
    if manifest.quantization is not None:
        return None  # bytes don't say how many numbers they are
    passes = [("target", width), ("lm_head", width)]
    if width > 1:
        drafting = width - 1 if manifest.drafter.samples_from_anchor else width
        head = "draft_lm_head" if "draft_lm_head" in manifest.graphs else "lm_head"
        passes += [("inject", width), ("draft", drafting), (head, width - 1)]
    sizes = {graph: weight_bytes(bundle.graph_path(graph)) for graph, _ in passes}
    item_size = 4 if manifest.precision == "fp32" else 2
    return StepFloor(
        weight_bytes=sum(sizes[graph] for graph, _ in passes),
        operations=sum(2 * rows * sizes[graph] // item_size for graph, rows in passes),
        bytes_per_second=bytes_per_second,
    )


# Field numbers of onnx.proto: ModelProto.graph, GraphProto.initializer, and of TensorProto the bytes that
# are inside the file and the key-value pairs that point to bytes in another one.
_GRAPH, _INITIALIZER, _RAW_DATA, _EXTERNAL_DATA = 7, 5, 9, 13


def weight_bytes(path: Path) -> int:
    """Bytes of all initializers of an ONNX file, external ones included, without loading them.

    Tensors that keep their values in typed fields instead of raw bytes aren't counted; large ones never do.

    Raises:
        IntegrityError: the file can't be read, or isn't ONNX.
    """
    total = 0
    try:
        model = memoryview(path.read_bytes())
        for graph in _messages(model, _GRAPH):
            for tensor in _messages(graph, _INITIALIZER):
                total += sum(len(raw) for raw in _messages(tensor, _RAW_DATA))
                entries = [tuple(_messages(pair, 1, 2)) for pair in _messages(tensor, _EXTERNAL_DATA)]
                total += sum(int(bytes(value)) for key, value in entries if bytes(key) == b"length")
    except (OSError, ValueError, IndexError) as error:
        raise IntegrityError(
            f"{path.name} can't be read as an ONNX file",
            found=error,
            expected="a graph that ONNX Runtime loads",
            todo="copy the bundle again, or build it again with `dflash-export build --force`",
        ) from error
    return total


def _messages(data: memoryview, *numbers: int) -> Iterator[memoryview]:
    """Length-delimited fields of a protobuf message that have one of ``numbers``, in order."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire_type = key >> 3, key & 7
        if wire_type == 2:
            size, at = _varint(data, at)
            if at + size > len(data):
                raise ValueError("a field is longer than the file")
            if number in numbers:
                yield data[at : at + size]
            at += size
        elif wire_type == 0:
            _, at = _varint(data, at)
        elif wire_type in (1, 5):
            at += 8 if wire_type == 1 else 4
        else:
            raise ValueError(f"a field of unknown kind {wire_type}")


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
