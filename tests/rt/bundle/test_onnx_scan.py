"""The scan of ONNX files against the onnx package."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from dflash_rt.bundle.onnx_scan import CHILDREN, external_locations
from dflash_rt.errors import IntegrityError


def outside(location: str) -> TensorProto:
    tensor = TensorProto(name=location, data_type=TensorProto.FLOAT, dims=[1])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("offset", "0"), ("location", location), ("length", "4")):
        tensor.external_data.add(key=key, value=value)
    return tensor


def leads_to_tensor(message: object, seen: frozenset[str] = frozenset()) -> bool:
    name = message.name  # type: ignore[attr-defined]
    if name == "TensorProto":
        return True
    children = [field.message_type for field in message.fields if field.message_type]  # type: ignore[attr-defined]
    return name not in seen and any(leads_to_tensor(child, seen | {name}) for child in children)


def test_every_place_of_a_tensor_is_known() -> None:
    """By the descriptors of the onnx package: no message can hold a tensor where the scan doesn't look."""
    found, left = dict[str, dict[int, str]](), [onnx.ModelProto.DESCRIPTOR]
    while left:
        message = left.pop()
        if message.name in found or message.name == "TensorProto":
            continue
        fields = [f for f in message.fields if f.message_type and leads_to_tensor(f.message_type)]
        found[message.name] = {field.number: field.message_type.name for field in fields}
        left += [field.message_type for field in fields]
    assert found == CHILDREN


def test_locations_are_found_wherever_they_are(tmp_path: Path) -> None:
    constant = helper.make_node("Constant", [], ["c"], value=outside("constant"))
    tensors = [outside("subgraph"), outside("twice")]
    inner = helper.make_graph([constant], "inner", [], [], initializer=tensors)
    branch = helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)
    graph = helper.make_graph([branch], "g", [], [], initializer=[outside("twice"), outside("top/ä")])
    model = helper.make_model(graph)
    constant = helper.make_node("Constant", [], ["c"], value=outside("function"))
    model.functions.add(name="f").node.append(constant)
    path = tmp_path / "graph.onnx"
    path.write_bytes(model.SerializeToString())
    assert external_locations(path) == ("constant", "function", "subgraph", "top/ä", "twice")


@pytest.mark.parametrize("data", [b"\x3a\x7f", b"\x80" * 100_000, b"content", b"\x3a"])
def test_what_is_not_onnx_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "graph.onnx"
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"graph\.onnx can't be read as an ONNX file"):
        external_locations(path)


def varint(value: int) -> bytes:
    return bytes([value & 0x7F | 0x80, value >> 7]) if value >= 0x80 else bytes([value])


def test_graphs_nested_without_end_are_refused(tmp_path: Path) -> None:
    data = b""
    for _ in range(40):
        for number in (6, 5, 1):  # of an attribute its graph, of a node its attributes, of a graph its nodes
            data = bytes([number << 3 | 2]) + varint(len(data)) + data
    path = tmp_path / "graph.onnx"
    path.write_bytes(bytes([7 << 3 | 2]) + varint(len(data)) + data)
    with pytest.raises(IntegrityError, match="nested more than 64 deep"):
        external_locations(path)
