"""The arithmetic behind the verdicts, over many random inputs."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dflash_export.errors import VerifyError
from dflash_export.parity.error_stats import ErrorCollector, ErrorStats, FeatureErrorCollector
from dflash_export.parity.limits import (
    Limits,
    classify,
    compare_steps,
    equal_prefix,
    first_difference,
    logit_gaps,
    make_limits,
)
from dflash_rt.errors import NumericalError

tokens = st.lists(st.integers(0, 3), max_size=12)
distance = st.floats(0, 1e6)
wide = settings(max_examples=200, deadline=None)


def stats(error: float = 0.0, *, std: float = 1.0, largest: float = 8.0) -> ErrorStats:
    """Errors that are all alike."""
    return ErrorStats(
        rows=1,
        values=10,
        max_abs=error,
        rms=error,
        median_row=error,
        row_99=error,
        worst_row=error,
        std=std,
        largest=largest,
    )


def limits(*errors: float, noise: float = 1e-6, precision: str = "fp32") -> Limits:
    noisy = stats(noise)
    measured = [stats(error) for error in errors]
    return make_limits(errors=measured, shapes=measured[:1], repeated=noisy, noise=noisy, precision=precision)


# --- A token ---


@given(distance, distance)
@wide
def test_a_token_is_a_near_tie_up_to_the_bound_and_no_further(logit_gap: float, bound: float) -> None:
    assert classify(logit_gap, bound) == ("near tie" if logit_gap <= bound else "bug")
    assert classify(bound, bound) == "near tie"
    assert classify(math.nextafter(bound, math.inf), bound) == "bug"
    assert classify(logit_gap, bound, same=True) == "equal"


def test_what_is_no_number_is_a_bug() -> None:
    assert classify(math.nan, 1.0) == "bug"
    assert classify(0.0, math.nan) == "bug"


@given(st.integers(0, 2**32 - 1), st.floats(1e-6, 10), st.integers(2, 9))
@wide
def test_no_error_within_the_bound_is_called_a_bug(seed: int, error: float, vocab: int) -> None:
    """Sound: two logits that are off by at most e each change places only if less than 2e apart."""
    generator = np.random.default_rng(seed)
    right = generator.standard_normal((20, vocab))
    found = right + generator.uniform(-error, error, right.shape)
    below = logit_gaps(right, found.argmax(axis=1).tolist())
    assert {classify(value, 2 * np.abs(found - right).max()) for value in below} == {"near tie"}


@given(st.integers(0, 2**32 - 1))
@wide
def test_a_token_beyond_the_error_is_called_a_bug(seed: int) -> None:
    """Complete: whoever picks the worst token is caught, unless all are near ties."""
    generator = np.random.default_rng(seed)
    right = generator.standard_normal((20, 5)).astype(np.float32)
    below = logit_gaps(right, right.argmin(axis=1).tolist())
    assert below == pytest.approx(right.max(axis=1) - right.min(axis=1))
    assert all(classify(value, 0.99 * value) == "bug" for value in below)


# --- Limits ---


def test_bound_is_twice_the_largest_error_ours_or_pytorchs() -> None:
    assert limits(1e-6, 3e-6, noise=2e-6).near_tie == pytest.approx(6e-6)
    assert limits(1e-6, 3e-6, noise=5e-6).near_tie == pytest.approx(1e-5)


@given(st.floats(1e-3, 1e3))
@wide
def test_broken_logits_do_not_excuse_themselves(error: float) -> None:
    found = limits(1e-6, error)
    assert not found.allow(stats(error))
    assert found.near_tie == pytest.approx(2e-6)


@pytest.mark.parametrize("noise", [0.0, 1e-7, 1e-5, 9e-4])
def test_error_may_be_some_times_pytorchs_noise(noise: float) -> None:
    found = limits(noise, noise=noise)
    assert found.median_row == max(4 * noise, 100 * 2**-24)
    assert found.worst_row == max(10 * noise, 1000 * 2**-24)
    assert found.allow(stats(noise))
    assert not found.allow(stats(1.01 * found.median_row))


def test_one_bad_row_is_enough() -> None:
    found = limits(1e-6)
    row = stats(1e-6)
    assert found.allow(row)
    assert not found.allow(replace(row, worst_row=1e-3))


def test_a_mixture_of_experts_may_have_a_few_bad_rows() -> None:
    noise = stats(1e-6)
    found = make_limits(
        errors=[noise], shapes=[noise], repeated=noise, noise=noise, precision="fp32", mixture=True
    )
    assert found.allow(replace(noise, worst_row=1.0))
    assert not found.allow(replace(noise, row_99=1e-3, worst_row=1.0))


@pytest.mark.parametrize("wrong", [stats(1.1e-3), replace(stats(1e-6), worst_row=0.011)])
def test_pytorch_that_disagrees_with_itself_is_no_yardstick(wrong: ErrorStats) -> None:
    """Or whatever went wrong there would be taken for noise, and excuse everything."""
    with pytest.raises(VerifyError, match="generate and PyTorch's one pass"):
        make_limits(errors=[], shapes=[], repeated=wrong, noise=wrong, precision="fp32")


@pytest.mark.parametrize(("precision", "bits"), [("fp32", 23), ("fp16", 10), ("bf16", 7)])
def test_own_ties_are_never_below_the_spacing_of_floats(precision: str, bits: int) -> None:
    # 8 = 2^3: the next float is 2^(3 - bits) away, and each of two logits may be that far off.
    assert limits(0.0, precision=precision).own_tie == 2 * 2.0 ** (3 - bits)
    assert limits(7.0, precision=precision).own_tie == 14.0


# --- Errors ---


@given(
    arrays(np.float32, (6, 7), elements=st.floats(-100, 100, width=32)),
    arrays(np.float32, (6, 7), elements=st.floats(-100, 100, width=32)),
    st.integers(1, 5),
)
@wide
def test_meter_agrees_with_numpy(found: np.ndarray, right: np.ndarray, cut: int) -> None:
    collector = ErrorCollector("test")
    collector.add(found[:cut], right[:cut])
    collector.add(found[cut:], right[cut:])
    got = collector.result()
    difference = np.abs(found.astype(np.float64) - right)
    assert (got.rows, got.values) == (6, 42)
    assert got.max_abs == pytest.approx(difference.max(), rel=1e-6)
    assert got.rms == pytest.approx(np.sqrt((difference**2).mean()), rel=1e-5)
    rows = np.sort(np.sqrt((difference**2).mean(axis=1)))
    assert (got.median_row, got.row_99, got.worst_row) == pytest.approx(rows[[2, 5, 5]].tolist(), rel=1e-5)
    assert got.std == pytest.approx(np.sqrt(right.astype(np.float64).var(axis=1).mean()), rel=1e-5)
    assert got.largest == np.abs(right).max()


def test_meter_refuses_what_is_not_finite() -> None:
    collector = ErrorCollector("the bundle, 4 rows a pass")
    with pytest.raises(NumericalError, match="the bundle, 4 rows a pass are not finite"):
        collector.add(np.array([[0.0, np.nan]]), np.zeros((1, 2)))


def test_meter_without_rows() -> None:
    collector = ErrorCollector("test")
    collector.add(np.zeros((0, 5)), np.zeros((0, 5)))
    assert collector.result() == ErrorStats(0, 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    assert collector.result().relative(0.0) == 0.0


def test_features_are_compared_row_by_row() -> None:
    right = np.ones((2, 2, 4), np.float32)
    right[0] *= 1e4  # a first row like that of real models
    found = right.copy()
    found[1, 1] *= 1.5
    collector = FeatureErrorCollector([3, 5])
    collector.add(found, right)
    first, second = collector.result()
    assert (first.layer, first.rms, first.worst) == (3, 0.0, 0.0)
    assert (second.layer, second.worst) == (5, pytest.approx(0.5))
    assert second.rms == pytest.approx(0.5 / math.sqrt(2))


# --- Sequences ---


@given(tokens, tokens)
@wide
def test_first_difference(first: list[int], second: list[int]) -> None:
    index = first_difference(first, second)
    assert (index is None) == (first == second)
    assert index == first_difference(second, first)
    if index is not None:
        assert index == equal_prefix(first, second)
        assert first[:index] == second[:index]
        assert first[index : index + 1] != second[index : index + 1]


def test_one_that_ends_early_differs_where_it_ends() -> None:
    assert first_difference([1, 2], [1, 2, 3]) == 2


def run(seed: int, length: int, widest: int = 4) -> tuple[list[int], list[int]]:
    """Random tokens, and gains per step that cover them; the last step may gain more than fits."""
    generator = np.random.default_rng(seed)
    gained: list[int] = []
    while 1 + sum(gained) < length:
        gained.append(int(generator.integers(1, widest + 1)))
    return generator.integers(0, 3, length).tolist(), gained


@given(st.integers(0, 10**6), st.integers(1, 30))
@wide
def test_a_run_agrees_with_itself_cut_or_not(seed: int, length: int) -> None:
    ids, gained = run(seed, length)
    cut = [*gained]
    if cut:
        cut[-1] -= 1 + sum(cut) - length
    assert compare_steps(ids, gained, ids, cut) == (len(gained), len(gained))


@pytest.mark.parametrize(
    ("gained", "other", "compared", "same"),
    [
        ([2, 2, 2], [2, 2, 2], 3, 3),
        ([2, 2, 2], [4, 2], 2, 1),  # starts 1, 3, 5 and 1, 5
        ([2, 2, 2], [3, 3], 1, 0),  # starts 1, 3, 5 and 1, 4
        ([1, 1, 1, 1, 1, 1], [6], 1, 0),
        ([6], [7], 1, 1),  # both reach the end
        ([], [], 0, 0),
    ],
)
def test_steps_are_matched_by_where_they_begin(
    gained: list[int], other: list[int], compared: int, same: int
) -> None:
    ids = [0, 1, 2, 0, 1, 2, 0]
    assert compare_steps(ids, gained, ids, other) == (compared, same)


def test_steps_count_only_while_the_tokens_agree() -> None:
    ours, theirs = [0, 1, 2, 0, 1, 2, 0], [0, 1, 2, 0, 3, 2, 0]
    assert compare_steps(ours, [2, 2, 2], theirs, [2, 1, 3]) == (2, 2)  # not the ones from 4 on
