"""Finds the weights of an ONNX file without the onnx package, by scanning its protobuf messages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dflash_rt.errors import IntegrityError

__all__ = ["CHILDREN", "external_locations", "weight_bytes"]

# Field numbers of onnx.proto: ModelProto.graph, GraphProto.initializer, TensorProto.raw_data (bytes in this
# file) and TensorProto.external_data (key-value pairs that locate bytes in another file).
_GRAPH, _INITIALIZER, _RAW_DATA, _EXTERNAL_DATA = 7, 5, 9, 13

CHILDREN: dict[str, dict[int, str]] = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto",
        6: "GraphProto",
        10: "TensorProto",
        11: "GraphProto",
        22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
}
"""All fields through which a model can hold tensors: message -> field number -> message."""

_DEEPEST = 64  # subgraphs within subgraphs; exported graphs have none


def weight_bytes(path: Path) -> int:
    """Bytes of all initializers of an ONNX file, external ones included, without loading them.

    Tensors with values in typed fields instead of raw bytes aren't counted; large tensors have none.

    Raises:
        IntegrityError: the file can't be read, or isn't ONNX.
    """
    total = 0
    try:
        for graph in _messages(memoryview(path.read_bytes()), _GRAPH):
            for _, tensor in _messages_of(graph, _INITIALIZER):
                total += sum(len(raw) for raw in _messages(tensor, _RAW_DATA))
                total += sum(int(value) for key, value in _external_data(tensor) if key == b"length")
    except (OSError, ValueError, IndexError) as error:
        raise _not_onnx(path, error) from error
    return total


def external_locations(path: Path) -> tuple[str, ...]:
    """The files that the tensors of an ONNX file point to, as it names them, sorted.

    Raises:
        IntegrityError: the file can't be read, or isn't ONNX.
    """
    try:
        tensors = _tensors(memoryview(path.read_bytes()), "ModelProto", 0)
        pairs = (pair for tensor in tensors for pair in _external_data(tensor))
        return tuple(sorted({value.decode("utf-8") for key, value in pairs if key == b"location"}))
    except (OSError, ValueError, IndexError) as error:
        raise _not_onnx(path, error) from error


def _tensors(message: memoryview, kind: str, depth: int) -> Iterator[memoryview]:
    if depth > _DEEPEST:
        raise ValueError(f"messages nested more than {_DEEPEST} deep")
    children = CHILDREN[kind]
    for number, child in _messages_of(message, *children):
        if children[number] == "TensorProto":
            yield child
        else:
            yield from _tensors(child, children[number], depth + 1)


def _external_data(tensor: memoryview) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values that locate a tensor's bytes."""
    for pair in _messages(tensor, _EXTERNAL_DATA):
        parts = {number: bytes(part) for number, part in _messages_of(pair, 1, 2)}
        yield parts.get(1, b""), parts.get(2, b"")


def _not_onnx(path: Path, error: Exception) -> IntegrityError:
    return IntegrityError(
        f"{path.name} can't be read as an ONNX file",
        found=error,
        expected="a graph that ONNX Runtime loads",
        remedy="copy the bundle again, or build it again with `dflash-export build --force`",
    )


def _messages(data: memoryview, *numbers: int) -> Iterator[memoryview]:
    """Length-delimited fields of a protobuf message with one of ``numbers``, in order."""
    return (message for _, message in _messages_of(data, *numbers))


def _messages_of(data: memoryview, *numbers: int) -> Iterator[tuple[int, memoryview]]:
    """These fields with their numbers."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire_type = key >> 3, key & 7
        if wire_type == 2:
            size, at = _varint(data, at)
            if at + size > len(data):
                raise ValueError("a field is longer than the file")
            if number in numbers:
                yield number, data[at : at + size]
            at += size
        elif wire_type == 0:
            _, at = _varint(data, at)
        elif wire_type in (1, 5):
            at += 8 if wire_type == 1 else 4
        else:
            raise ValueError(f"a field of unknown kind {wire_type}")


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number of more than 64 bits")
