"""DFlash 2's selector as a graph against the reference's walk, row by row."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from dflash.model import CandidateSelector
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_export import build
from tests.pairs import Graphs, TargetSpec, drafter_config, make_drafter, make_target

VOCAB, RANK, TOP_K, BLOCK = 20, 6, 5, 8
Array = npt.NDArray[Any]
DFLASH2 = {"conv_kernel_size": 3, "conv_group_size": 8, "selector_rank": RANK, "selector_top_k": TOP_K}


@pytest.fixture(scope="module")
def select(tmp_path_factory: pytest.TempPathFactory) -> tuple[Callable[..., dict[str, Array]], Any]:
    """The graph of a random drafter, and the reference's module with the same weights."""
    root = tmp_path_factory.mktemp("select")
    spec = TargetSpec("qwen3", vocab=VOCAB)
    raw = drafter_config(
        spec, layers=1, block_size=BLOCK, architectures=["DFlash2DraftModel"], dflash_config=DFLASH2
    )
    make_target(root / "target", spec)
    make_drafter(root / "drafter", raw, spread=0.5)
    graphs = Graphs(build(root / "target", root / "drafter", root / "bundle"))
    reference = CandidateSelector(
        SimpleNamespace(vocab_size=VOCAB, hidden_size=spec.hidden, dflash_config=DFLASH2)
    )
    reference.load_state_dict(_weights(root / "drafter"))

    def run(**inputs: Array) -> dict[str, Array]:
        return graphs.run("select", **inputs)

    return run, reference


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    prefix = "candidate_selector."
    return {
        name.removeprefix(prefix) + (".weight" if name.endswith("codebook") else ""): value
        for name, value in load_file(folder / "model.safetensors").items()
        if name.startswith(prefix)
    }


def inputs(seed: int, batch: int, rows: int) -> dict[str, Array]:
    generator = np.random.default_rng(seed)
    return {
        "hidden": generator.standard_normal((batch, rows, 32)).astype(np.float32),
        "logits": (3 * generator.standard_normal((batch, rows, VOCAB))).astype(np.float32),
        "anchors": generator.integers(0, VOCAB, batch),
        "temperature": np.zeros(batch, np.float32),
        "uniforms": generator.random((batch, rows), np.float32),
    }


def walk(reference: Any, given: dict[str, Array], row: int) -> tuple[Array, Array, Array]:
    """Tokens, probabilities by token ``[rows, vocab]``, and the distance of a number to the next boundary.

    One sequence, a row at a time: at temperature 0 by the reference's own ``select``, above it by its scores,
    with the graph's rule for a number and candidates in the order of their logits.
    """
    temperature = float(given["temperature"][row])
    hidden, logits = (torch.from_numpy(given[name][row : row + 1]) for name in ("hidden", "logits"))
    anchor = torch.from_numpy(given["anchors"][row : row + 1])
    if temperature == 0:
        path, _, _ = reference.select(hidden, logits, anchor, 0.0)
        tokens = path[0].numpy()
        return tokens, np.eye(VOCAB)[tokens], np.ones(len(tokens))
    tokens_found, probabilities, distances = [], [], []
    for position in range(hidden.shape[1]):
        unary, candidates = torch.topk(logits[:, position], TOP_K)
        scores = unary + torch.einsum(
            "br,bkr->bk",
            reference.predecessor_codebook(anchor) * reference.hidden_projection(hidden[:, position]),
            reference.successor_codebook(candidates),
        )
        weights = torch.softmax(scores[0].double() / temperature, -1).detach().numpy()
        number = float(given["uniforms"][row, position])
        index = min(int((weights.cumsum() <= number).sum()), TOP_K - 1)
        distances.append(float(np.abs(weights.cumsum() - number).min()))
        anchor = candidates[:, index]
        tokens_found.append(int(anchor))
        dense = np.zeros(VOCAB)
        dense[candidates[0].numpy()] = weights
        probabilities.append(dense)
    return np.array(tokens_found), np.array(probabilities), np.array(distances)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, BLOCK - 1),
    temperatures=st.lists(st.sampled_from([0.0, 0.3, 1.0, 4.0]), min_size=1, max_size=3),
)
def test_the_walk_is_the_references(
    select: tuple[Callable[..., dict[str, Array]], Any], seed: int, rows: int, temperatures: list[float]
) -> None:
    run, reference = select
    given_inputs = inputs(seed, len(temperatures), rows)
    given_inputs["temperature"] = np.array(temperatures, np.float32)
    found = run(**given_inputs)
    for row in range(len(temperatures)):
        with torch.no_grad():
            tokens, probabilities, distances = walk(reference, given_inputs, row)
        if distances.min() < 1e-5:
            continue  # rounding decides
        assert found["token_ids"][row].tolist() == tokens.tolist()
        dense = np.zeros((rows, VOCAB))
        np.put_along_axis(dense, found["candidates"][row], found["probabilities"][row], -1)
        np.testing.assert_allclose(dense, probabilities, atol=1e-5)


@pytest.mark.parametrize("temperature", [1e-36, 1e-37, 1e-38, 1e-45, 1e-300])
def test_the_coldest_temperatures_are_greedy(
    select: tuple[Callable[..., dict[str, Array]], Any], temperature: float
) -> None:
    run, _ = select
    given_inputs = inputs(2, 1, BLOCK - 1)
    given_inputs["logits"] *= 50  # far apart, so that scores divided by the temperature would overflow
    given_inputs["uniforms"] = np.random.default_rng(3).random((1, BLOCK - 1), np.float32)
    greedy = run(**given_inputs)
    given_inputs["temperature"] = np.array([temperature]).astype(np.float32)
    found = run(**given_inputs)
    assert found["token_ids"].tolist() == greedy["token_ids"].tolist()
    np.testing.assert_array_equal(found["probabilities"], greedy["probabilities"])


def test_the_largest_number_still_picks_a_candidate(
    select: tuple[Callable[..., dict[str, Array]], Any],
) -> None:
    run, _ = select
    given_inputs = inputs(1, 1, BLOCK - 1)
    given_inputs["temperature"][:] = 1.0
    given_inputs["uniforms"][:] = np.float32(1 - 2**-24)
    found = run(**given_inputs)
    assert found["token_ids"].tolist()[0] == found["candidates"][0, :, -1].tolist()
