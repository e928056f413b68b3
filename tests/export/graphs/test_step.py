"""What ends a step on a device gives what the loop's own functions give, for every slot of a batch."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_export.graphs.simple import accept_graph, draft_check_graph
from dflash_rt.sampling.greedy import accept_greedy

Array = npt.NDArray[Any]
VOCAB = 5


@cache
def session(name: str) -> ort.InferenceSession:
    graph = {"accept": accept_graph, "draft_check": draft_check_graph}[name](VOCAB)
    model = ir.serde.serialize_model(graph.model)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def accept(block: Array, verified: Array, logits: Array, start: Array) -> dict[str, list[int]]:
    names = [output.name for output in session("accept").get_outputs()]
    feeds = {"block": block, "token_ids": verified, "logits": logits, "start": start}
    outputs = session("accept").run(None, feeds)
    assert {output.dtype for output in outputs} == {np.dtype(np.int64)}
    return {name: output.tolist() for name, output in zip(names, outputs, strict=True)}


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 3), st.integers(1, 6), st.integers(2, VOCAB), st.integers(0, 2**32 - 1))
def test_accepts_as_the_loop_does(batch: int, rows: int, tokens: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    block, verified = generator.integers(0, tokens, (2, batch, rows))
    start = generator.integers(0, 2**40, batch)
    logits = generator.normal(0, 1e3, (batch, rows, VOCAB)).astype(np.float32)
    accepted = accept_greedy(block[:, 1:], verified)
    assert accept(block, verified, logits, start) == {
        "accepted": accepted.tolist(),
        "anchors": verified[np.arange(batch), accepted].tolist(),
        "start.out": (start + accepted + 1).tolist(),
        "finite": [1] * batch,
    }


@pytest.mark.parametrize(
    ("block", "verified", "accepted", "bonus"),
    [
        ([7], [3], 0, 3),  # a plain step
        ([7, 8, 9], [8, 9, 1], 2, 1),  # all of them
        ([7, 8, 9], [7, 8, 9], 0, 7),  # the columns are those after each row
        ([7, 8, 9, 1], [8, 5, 1, 2], 1, 5),  # agreement behind a rejection doesn't count
        ([2**40, 2**40 + 1], [2**40 + 1, 2**40 + 2], 1, 2**40 + 2),  # no id is cut to 32 bits
        ([7, 2**40], [2**40 + 1, 0], 0, 2**40 + 1),
    ],
)
def test_edges(block: list[int], verified: list[int], accepted: int, bonus: int) -> None:
    logits = np.zeros((1, len(block), VOCAB), np.float32)
    found = accept(np.array([block]), np.array([verified]), logits, np.array([100]))
    assert (found["accepted"], found["anchors"]) == ([accepted], [bonus])
    assert found["start.out"] == [101 + accepted]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, None])
@pytest.mark.parametrize("filling", [0.0, 3.4e38, -3.4e38])
def test_finite(bad: float | None, filling: float) -> None:
    """One value decides, for its own slot; large finite ones are finite, though their sum overflows."""
    logits = np.full((3, 4, VOCAB), filling, np.float32)
    if bad is not None:
        logits[1, 3, VOCAB - 1] = bad
    ids = np.zeros((3, 4), np.int64)
    expected = [1, int(bad is None), 1]
    assert accept(ids, ids, logits, np.zeros(3, np.int64))["finite"] == expected
    (found,) = session("draft_check").run(None, {"logits": logits})
    assert found.tolist() == expected


def test_infinities_of_both_signs_dont_cancel() -> None:
    logits = np.zeros((1, 2, VOCAB), np.float32)
    logits[0, 0, 0], logits[0, 1, 0] = np.inf, -np.inf
    (found,) = session("draft_check").run(None, {"logits": logits})
    assert found.tolist() == [0]
