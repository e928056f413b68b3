"""How fast ONNX Runtime multiplies a few rows by weights that come from memory: the floor of every graph.

    python benchmarks/products.py [--threads 2]

Each line is one shape of the demo target. As many distinct matrices as fill 200 MB run in turn, so that none
stays in a cache; the figure is bytes of weights over the median time of a pass.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

SHAPES = {"q, k, v": (576, 960), "o": (576, 576), "gate, up": (576, 3072), "down": (1536, 576)}
HEAD = (576, 49152)
ROWS = (1, 2, 4, 8, 16)
TOTAL_BYTES = 200_000_000


def products(inner: int, outer: int, count: int) -> bytes:
    """A model of ``count`` products ``[rows, inner] x [inner, outer]``, each reduced to a number."""
    generator = np.random.default_rng(0)
    weights, nodes = [], []
    for index in range(count):
        values = generator.standard_normal((inner, outer), np.float32)
        weights.append(numpy_helper.from_array(values, f"w{index}"))
        nodes.append(helper.make_node("MatMul", ["x", f"w{index}"], [f"y{index}"]))
        nodes.append(helper.make_node("ReduceSum", [f"y{index}"], [f"s{index}"], keepdims=0))
    nodes.append(helper.make_node("Sum", [f"s{index}" for index in range(count)], ["sum"]))
    source = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", inner])
    result = helper.make_tensor_value_info("sum", TensorProto.FLOAT, [])
    graph = helper.make_graph(nodes, "products", [source], [result], weights)
    model: onnx.ModelProto = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10
    )
    return model.SerializeToString()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    options = ort.SessionOptions()
    options.intra_op_num_threads = parser.parse_args().threads
    print(f"{'GB/s at rows':14}" + "".join(f"{rows:>8}" for rows in ROWS))
    for name, (inner, outer) in {**SHAPES, "head": HEAD}.items():
        size = inner * outer * 4
        count = max(1, TOTAL_BYTES // size)
        model = products(inner, outer, count)
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        line = f"{name:14}"
        for rows in ROWS:
            x = np.ones((rows, inner), np.float32)
            seconds = []
            for _ in range(12):
                begin = time.perf_counter()
                session.run(None, {"x": x})
                seconds.append(time.perf_counter() - begin)
            line += f"{count * size / np.median(seconds[2:]) / 1e9:8.1f}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
