"""Tracing with one table of operators for all graphs gives what torch's own call gives."""

from __future__ import annotations

import copy

import onnx_ir as ir
import torch
from torch import nn

from dflash_export.graphs import trace as tracing
from dflash_export.graphs.graph import OPSET, GraphTensor
from dflash_export.graphs.trace import fake_mode, trace


class _Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.up(rows))).float()


def _by_torch(model: nn.Module, rows: torch.Tensor) -> ir.Model:
    shapes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("rows")},)
    with tracing._quiet():
        program = torch.export.export(model, (rows,), dynamic_shapes=shapes)
    names = {"input_names": ["rows"], "output_names": ["result"]}
    with tracing._quiet():
        found = torch.onnx.export(program, (), opset_version=OPSET, optimize=False, verbose=False, **names)
    assert found is not None
    return found.model


def test_the_table_of_operators_can_be_kept() -> None:
    axes = ("batch", "rows", 4)
    tensors = [GraphTensor(name, ir.DataType.FLOAT, axes) for name in ("rows", "result")]
    before = copy.copy(tracing._operators().functions)
    with fake_mode():
        model = _Layers().eval()
    found = [tracing._traced(model, tensors[:1], ["result"]) for _ in range(2)]
    assert trace(model, tensors[:1], tensors[1:]).weights.keys() == {
        "up.weight",
        "up.bias",
        "down.weight",
        "down.bias",
    }
    assert tracing._operators().functions == before
    right = _by_torch(_Layers().eval(), torch.zeros(2, 5, 4))
    for each in found:
        nodes = [
            [(node.op_type, node.name, [v.name for v in node.inputs if v]) for node in m.graph]
            for m in (each, right)
        ]
        assert nodes[0] == nodes[1]
