"""The graph gives what the sampler gives, up to rounding at the boundary between two tokens."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_export.engines.builder import make_logger
from dflash_export.graphs.graph import OPSET
from dflash_export.graphs.sampling import sample_graph
from dflash_rt.sampling.distribution import GROUP, Distribution, distribution, noise_size
from dflash_rt.sampling.params import SamplingParams

Array = npt.NDArray[Any]
EDGE = 1e-5  # float32 sums are off by less, in parts of themselves


@cache
def sampling_model() -> onnx.ModelProto:
    model = ir.serde.serialize_model(sample_graph().model)
    onnx.checker.check_model(model, full_check=True)
    return model


@cache
def session() -> ort.InferenceSession:
    return ort.InferenceSession(sampling_model().SerializeToString(), providers=["CPUExecutionProvider"])


class Slot:
    """One slot of a batch: the inputs of a step, and what the sampler chooses."""

    def __init__(self, params: SamplingParams, logits: Array, noise: Array) -> None:
        # In float32, as the graph gets it.
        self.noise = noise.astype(np.float32).astype(np.float64)
        self.params, self.logits = params, logits

    def feeds(self) -> dict[str, Array]:
        return {
            "logits": self.logits,
            "noise_within": self.noise[:, :GROUP].astype(np.float32),
            "noise_between": self._between().astype(np.float32),
            "temperature": np.array(self.params.temperature, np.float32),
            "top_k": np.array(self.params.top_k, np.int64),
            "top_p": np.array(self.params.top_p, np.float32),
        }

    def _between(self) -> Array:
        between = self.noise[:, GROUP:]
        return between if between.shape[1] else np.ones((len(between), 1))

    def expected(self) -> list[int]:
        if self.params.temperature == 0:
            return [int(token) for token in self.logits.argmax(-1)]
        rows = zip(self.logits, self.noise, strict=True)
        return [distribution(scores, self.params).pick(noise) for scores, noise in rows]

    def nearest(self, row: int) -> float:
        """How near the choice of a row was."""
        if self.params.temperature == 0:
            return 1.0
        scores = self.logits[row]
        near = [*self._leads(distribution(scores, self.params), row)]
        whole = SamplingParams(temperature=self.params.temperature, top_k=self.params.top_k)
        before = np.sort(distribution(scores, whole).probabilities(scores.size))[::-1]
        if self.params.top_p < 1:
            near.append(float(abs(before.cumsum() - self.params.top_p).min()))
        return min(near)

    def _leads(self, p: Distribution, row: int) -> Iterator[float]:
        """By what part the second of each race came later than the first."""
        dense = p.probabilities(self.logits.shape[1])
        groups = [dense[first : first + GROUP] for first in range(0, dense.size, GROUP)]
        winner = groups[p.pick(self.noise[row]) // GROUP]
        sums = np.array([group.sum() for group in groups])
        for noise, weights in ((self._between()[row], sums), (self.noise[row, : winner.size], winner)):
            with np.errstate(divide="ignore"):
                first, *others = np.sort(noise / weights)
            yield float((others[0] - first) / first) if others else 1.0


def sampled(slots: list[Slot]) -> Array:
    feeds = [slot.feeds() for slot in slots]
    (token_ids,) = session().run(None, {name: np.stack([feed[name] for feed in feeds]) for name in feeds[0]})
    assert token_ids.dtype == np.int64
    return token_ids  # type: ignore[no-any-return]


def check(slots: list[Slot]) -> None:
    for slot, found in zip(slots, sampled(slots), strict=True):
        expected = slot.expected()
        for row, (got, wanted) in enumerate(zip(found.tolist(), expected, strict=True)):
            assert got == wanted or slot.nearest(row) < EDGE, (row, found, expected)


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1e-9, 0.3, 1.0, 2.5, 100.0]),
    top_k=st.sampled_from([0, 1, 3, 100]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 1e-4, 0.0]),
)


@settings(deadline=None, max_examples=250)
@given(
    seed=st.integers(0, 10**6),
    size=st.sampled_from([1, 2, 5, 40, 700]),
    rows=st.integers(1, 6),
    spread=st.sampled_from([0.0, 0.5, 3.0, 20.0, 1e4]),
    ties=st.booleans(),
    params=st.lists(PARAMS, min_size=1, max_size=3),
)
def test_equals_the_sampler(
    *, seed: int, size: int, rows: int, spread: float, ties: bool, params: list[SamplingParams]
) -> None:
    random = np.random.default_rng(seed)
    slots = []
    for each in params:
        logits = random.normal(0, spread, (rows, size)).astype(np.float32)
        noise = random.exponential(size=(rows, noise_size(size)))
        slots.append(Slot(each, np.round(logits) if ties else logits, noise))
    check(slots)


@pytest.mark.parametrize("number", [1e-30, 1.0, 36.7])
@pytest.mark.parametrize("temperature", [0.0, 1e-30, 1.0, 100.0])
def test_edges(number: float, temperature: float) -> None:
    rows = {
        "certain": [[-1e30, 0, -1e30, -1e30]] * 3,
        "flat": [[2, 2, 2, 2]] * 3,
        "huge": [[3e38, -3e38, 0, 1]] * 3,
        "close": [[1e-4, 0, -1e-4, 0]] * 3,
    }
    for logits in rows.values():
        for changes in ({}, {"top_k": 1}, {"top_p": 0.0}, {"top_p": 0.5}):
            params = SamplingParams(temperature=temperature, **changes)  # type: ignore[arg-type]
            slot = Slot(params, np.array(logits, np.float32), np.full((3, 4), number))
            assert sampled([slot])[0].tolist() == slot.expected(), (logits, changes)


def test_a_vocabulary_of_a_real_size() -> None:
    random = np.random.default_rng(0)
    slots = []
    for seed in range(4):
        logits = (random.normal(0, 2, (4, 49152)) + 6 * (random.random((4, 49152)) < 1e-4)).astype(np.float32)
        params = SamplingParams(temperature=0.9, top_p=0.9 if seed % 2 else 1.0, top_k=50 if seed > 1 else 0)
        slots.append(Slot(params, logits, random.exponential(size=(4, noise_size(49152)))))
    check(slots)


def test_only_standard_operators() -> None:
    model = sampling_model()
    assert [(item.domain, item.version) for item in model.opset_import] == [("", OPSET)]
    assert {node.domain for node in model.graph.node} == {""}
    assert "TopK" not in {node.op_type for node in model.graph.node}
    assert [item.name for item in model.graph.input] == [item.name for item in session().get_inputs()]


def test_tensorrt_rtx_builds_it() -> None:
    """Parsed whole, without an unused input, and built for a vocabulary of a real size."""
    trt = pytest.importorskip(
        "tensorrt_rtx", reason="engines are built: pip install 'dflash-export[tensorrt-rtx]'"
    )
    logger = make_logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    model = sampling_model()
    assert parser.parse(model.SerializeToString()), logger.errors
    assert {network.get_input(i).name for i in range(network.num_inputs)} == {
        i.name for i in model.graph.input
    }
    profile, config = builder.create_optimization_profile(), builder.create_builder_config()
    sizes = {"batch": 1, "vocab": 49152, "members": 256, "groups": 192}
    for tensor in model.graph.input:
        axes = [axis.dim_param for axis in tensor.type.tensor_type.shape.dim]
        shapes = [[(sizes | {"rows": n})[axis] for axis in axes] for n in (1, 8, 16)]
        profile.set_shape(tensor.name, *shapes)
    config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config) is not None, logger.errors
