"""The graph gives what the sampler gives, up to rounding at the boundary between two tokens."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_export.engines.monitor import make_logger
from dflash_export.graphs.sampling import OPSET, sampling_graph
from dflash_rt.sampling.distribution import GROUP, Distribution, distribution, noise_size, penalised
from dflash_rt.sampling.params import SamplingParams
from dflash_rt.sampling.sampler import Sampler

Array = npt.NDArray[Any]
EDGE = 1e-5  # float32 sums are off by less, in parts of themselves


@cache
def session() -> ort.InferenceSession:
    return ort.InferenceSession(sampling_graph().SerializeToString(), providers=["CPUExecutionProvider"])


class Slot:
    """One slot of a batch: the inputs of a step, and the sampler that has lived through the same."""

    def __init__(
        self, params: SamplingParams, logits: Array, drafted: list[int], noise: Array, past: Array
    ) -> None:
        # In float32, as the graph gets it.
        self.noise = noise.astype(np.float32).astype(np.float64)
        self.params, self.logits, self.drafted = params, logits, drafted
        self.prompt, self.output = past[: len(past) // 2 + 1], past[len(past) // 2 + 1 :]

    def feeds(self) -> dict[str, Array]:
        params, size = self.params, self.logits.shape[1]
        prompt_mask = np.zeros(size, np.float32)
        prompt_mask[self.prompt] = 1
        floats = {
            "temperature": params.temperature,
            "top_p": params.top_p,
            "min_p": params.min_p,
            "repetition": params.repetition_penalty,
            "presence": params.presence_penalty,
            "frequency": params.frequency_penalty,
        }
        return {
            "logits": self.logits,
            "drafted": np.array(self.drafted, np.int64),
            "noise_within": self.noise[:, :GROUP].astype(np.float32),
            "noise_between": self._between().astype(np.float32),
            "top_k": np.array(params.top_k, np.int64),
            "prompt_mask": prompt_mask,
            "counts": np.bincount(self.output, minlength=size).astype(np.float32),
            **{name: np.array(value, np.float32) for name, value in floats.items()},
        }

    def _between(self) -> Array:
        between = self.noise[:, GROUP:]
        return between if between.shape[1] else np.ones((len(between), 1))

    def at(self, position: int, vocab_size: int) -> Array:
        """As :meth:`dflash_rt.sampling.random_numbers.Noise.at`: a slot's rows are its positions."""
        assert vocab_size == self.logits.shape[1]
        return self.noise[position]

    def expected(self) -> list[int]:
        sampler = Sampler(self.params, self.prompt)
        for token in self.output.tolist():
            sampler._seen.add(token)
            sampler._output.add(token)
        sampler._noise = self  # type: ignore[assignment]
        return sampler.choose(self.logits, self.drafted)

    def boundaries(self, tokens: list[int]) -> Iterator[float]:
        """How near the choices were, for each row up to the last of ``tokens``."""
        if self.params.temperature == 0:
            yield 1.0
            return
        for row in range(len(tokens)):
            output = np.append(self.output, np.array(tokens[:row], np.int64))
            ids, counts = np.unique(output, return_counts=True)
            seen = np.unique(np.append(self.prompt, output))
            scores = penalised(
                self.logits[row], self.params, seen=seen, output=ids, counts=counts.astype(np.float32)
            )
            yield from self._leads(distribution(scores, self.params), row)
            whole = SamplingParams(temperature=self.params.temperature, top_k=self.params.top_k)
            before = np.sort(distribution(scores, whole).probabilities(scores.size))[::-1]
            if self.params.top_p < 1:
                yield float(abs(before.cumsum() - self.params.top_p).min())
            if self.params.min_p:
                yield float(abs(before / before[0] - self.params.min_p).min())

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


def check(slots: list[Slot]) -> None:
    feeds = [slot.feeds() for slot in slots]
    inputs = {name: np.stack([feed[name] for feed in feeds]) for name in feeds[0]}
    accepted, token_ids, counts = session().run(["accepted", "token_ids", "counts.out"], inputs)
    for number, slot in enumerate(slots):
        expected = slot.expected()
        found = token_ids[number, : accepted[number] + 1].tolist()
        if found != expected:
            assert min(slot.boundaries(expected)) < EDGE, (found, expected)
            continue
        added = np.bincount(expected, minlength=slot.logits.shape[1])
        assert (counts[number] == inputs["counts"][number] + added).all()


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1e-9, 0.3, 1.0, 2.5, 100.0]),
    top_k=st.sampled_from([0, 1, 3, 100]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 1e-4, 0.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.2, 0.8]),
    presence_penalty=st.sampled_from([0.0, 0.5, -0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.3, -0.2]),
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
        logits = np.round(logits) if ties else logits
        # Drafts that are often right: what the sampler itself would choose.
        noise = random.exponential(size=(rows, noise_size(size)))
        past = random.integers(0, size, 8)
        slot = Slot(each, logits, [-1] * (rows - 1), noise, past)
        for row in range(rows - 1):
            wrong = random.random() < 0.15
            slot.drafted[row] = int(random.integers(size)) if wrong else (slot.expected() + [0] * rows)[row]
        slots.append(slot)
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
    past = np.array([0])
    for logits in rows.values():
        for changes in ({}, {"top_k": 1}, {"top_p": 0.0}, {"top_p": 0.5}, {"min_p": 1.0}):
            params = SamplingParams(temperature=temperature, **changes)  # type: ignore[arg-type]
            for drafted in ([1, 1], [0, 0], [0, 3]):
                slot = Slot(params, np.array(logits, np.float32), drafted, np.full((3, 4), number), past)
                feeds = {name: value[None] for name, value in slot.feeds().items()}
                accepted, token_ids = session().run(["accepted", "token_ids"], feeds)
                found = token_ids[0, : accepted[0] + 1].tolist()
                assert found == slot.expected(), (logits, changes, drafted)


def test_a_vocabulary_of_a_real_size() -> None:
    random = np.random.default_rng(0)
    slots = []
    for seed in range(4):
        logits = (random.normal(0, 2, (4, 49152)) + 6 * (random.random((4, 49152)) < 1e-4)).astype(np.float32)
        params = SamplingParams(temperature=0.9, top_p=0.9 if seed % 2 else 1.0, top_k=50 if seed > 1 else 0)
        noise = random.exponential(size=(4, noise_size(49152)))
        slots.append(Slot(params, logits, [0, 0, 0], noise, random.integers(0, 49152, 30)))
    check(slots)


def test_only_standard_operators() -> None:
    model = sampling_graph()
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
    assert parser.parse(sampling_graph().SerializeToString()), logger.errors
    model = sampling_graph()
    assert {network.get_input(i).name for i in range(network.num_inputs)} == {
        i.name for i in model.graph.input
    }
    profile, config = builder.create_optimization_profile(), builder.create_builder_config()
    sizes = {"batch": 1, "vocab": 49152, "members": 256, "groups": 192}
    for tensor in model.graph.input:
        axes = [axis.dim_param for axis in tensor.type.tensor_type.shape.dim]
        shapes = [[(sizes | {"rows": n, "drafts": n - 1})[axis] for axis in axes] for n in (2, 8, 16)]
        profile.set_shape(tensor.name, *shapes)
    config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config) is not None, logger.errors
