"""From measurements to a verdict."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dflash_export.parity.limits import Limits
from dflash_export.parity.measure import Divergence, Measurements, Run
from dflash_export.parity.prompts import PromptInput
from dflash_export.parity.verdicts import classify_prompt

# --- Judging ---

LIMITS = Limits(near_tie=0.1, own_tie=0.01, median_row=1.0, worst_row=1.0)


def measurements(below: list[float], own: list[float], diverged: tuple[Divergence, ...] = ()) -> Measurements:
    ids = tuple(range(len(below)))
    runs = {"plain": Run("plain", 1, ids, "length"), "PyTorch": Run("PyTorch", 0, ids)}
    return Measurements(
        prompt=PromptInput("x", (1, 2)),
        runs=runs,
        logit_gaps={"plain": np.array(below), "PyTorch": np.zeros(len(ids))},
        own_logit_gaps={"plain": np.array(own)},
        margins=np.array([0.05, 1.0, 0.1][: len(ids)]),
        diverged=diverged,
    )


def test_every_token_has_to_be_excused_by_both_bounds() -> None:
    found = classify_prompt(0, measurements([0.0, 0.1, 0.0], [0.0, 0.0, 0.01]), LIMITS, str)
    plain = found.runs[0]
    assert (found.verdict, plain.near_ties, plain.faults) == ("near tie", 2, ())
    assert (found.smallest_margin, found.close_calls) == (0.05, 2)
    by_torch = classify_prompt(0, measurements([0.0, 0.11, 0.0], [0.0, 0.0, 0.0]), LIMITS, str)
    assert (by_torch.verdict, by_torch.runs[0].faults, by_torch.runs[0].worst_logit_gap) == (
        "bug",
        (1,),
        0.11,
    )
    by_itself = classify_prompt(0, measurements([0.0, 0.0, 0.05], [0.0, 0.0, 0.05]), LIMITS, str)
    assert (by_itself.verdict, by_itself.runs[0].faults) == ("bug", (2,))
    assert by_itself.runs[0].worst_own_logit_gap == 0.05


def test_difference_shows_both_tokens_and_what_pytorch_thinks() -> None:
    diverged = Divergence(("plain", "PyTorch"), 1, (5, 6), ((6, 2.5), (7, 2.25)), (0.3, 0.0))
    (item,) = classify_prompt(
        0, measurements([0.0] * 3, [0.0] * 3, (diverged,)), LIMITS, lambda token: f"<{token}>"
    ).differences
    assert (item.token, item.position) == (1, 3)
    assert [(token.id, token.text) for token in item.tokens if token] == [(5, "<5>"), (6, "<6>")]
    assert [(token.id, token.logit) for token in item.top_two] == [(6, 2.5), (7, 2.25)]
    assert (item.margin, item.logit_gap, item.verdict) == (0.25, 0.3, "bug")
    (tie,) = classify_prompt(
        0, measurements([0.0], [0.0], (replace(diverged, logit_gaps=(0.1, 0.0)),)), LIMITS, str
    ).differences
    assert tie.verdict == "near tie"


def test_a_run_that_ended_while_another_goes_on_is_a_bug() -> None:
    diverged = Divergence(("plain", "PyTorch"), 3, (None, 6), ((6, 2.5), (7, 2.25)), (0.0, 0.0))
    found = classify_prompt(0, measurements([0.0] * 3, [0.0] * 3, (diverged,)), LIMITS, str)
    assert (found.verdict, found.differences[0].tokens[0]) == ("bug", None)
