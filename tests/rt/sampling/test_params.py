"""Sampling parameters: their defaults, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dflash_rt.bundle.manifest import SamplingDefaults
from dflash_rt.errors import SamplingError
from dflash_rt.sampling.params import RANGES, SamplingParams

# --- parameters -------------------------------------------------------------------------------------------


def test_the_defaults_are_greedy() -> None:
    params = SamplingParams()
    assert (params.temperature, params.needs_logits, params.has_penalties) == (0, False, False)
    assert params.seeded() is params


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            (name, value)
            for name in RANGES
            for value in (float("nan"), float("inf"), -3, "1", None, True, 1j)
        ),
        ("temperature", 100.5),
        ("top_p", 1.01),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("top_k", -1),
        ("top_k", 3.0),
        ("top_k", None),
        ("top_k", True),
        ("seed", -1),
        ("seed", 2**64),
        ("seed", 1.0),
        ("seed", False),
        ("logprobs", -1),
        ("logprobs", 21),
        ("logprobs", True),
        ("logprobs", 1.0),
    ],
)
def test_wrong_values_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(SamplingError, match=f"{name} is wrong\n  found: .*\n  expected: .*\n  what to do: "):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5), np.int64(1), 1])
def test_numbers_of_any_kind_are_numbers(number: Any) -> None:
    assert SamplingParams(temperature=number, top_p=number, seed=np.int64(3)).needs_logits


@pytest.mark.parametrize(
    ("changes", "needs"),
    [
        ({"top_k": 3, "top_p": 0.5, "min_p": 0.1, "seed": 4}, False),
        ({"logprobs": 0}, True),
        ({"repetition_penalty": 1.1}, True),
        ({"presence_penalty": -0.1}, True),
        ({"frequency_penalty": 0.1}, True),
        ({"temperature": 1e-9}, True),
    ],
)
def test_what_needs_logits(changes: dict[str, Any], needs: bool) -> None:
    assert SamplingParams(**changes).needs_logits is needs


def test_a_manifest_may_say_what_parameters_may() -> None:
    for name, annotation in SamplingDefaults.__annotations__.items():
        for value in (SamplingParams.__dataclass_fields__[name].default, *RANGES.get(name, (0,))):
            assert SamplingParams(**{name: value})
        if name in RANGES:
            assert "Range({}, {})".format(*RANGES[name]) in annotation
