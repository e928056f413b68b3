"""From measurements to a verdict."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dflash_export.parity.limits import Limits
from dflash_export.parity.measure import Evidence, Measured, Run
from dflash_export.parity.prompts import PromptInput
from dflash_export.parity.verdicts import judge

# --- Judging ---

LIMITS = Limits(near_tie=0.1, own_tie=0.01, typical_row=1.0, worst_row=1.0)


def evidence(below: list[float], own: list[float], parted: tuple[Measured, ...] = ()) -> Evidence:
    ids = tuple(range(len(below)))
    runs = {"plain": Run("plain", 1, ids, "length"), "PyTorch": Run("PyTorch", 0, ids)}
    return Evidence(
        prompt=PromptInput("x", (1, 2)),
        runs=runs,
        shortfalls={"plain": np.array(below), "PyTorch": np.zeros(len(ids))},
        own_shortfalls={"plain": np.array(own)},
        margins=np.array([0.05, 1.0, 0.1][: len(ids)]),
        parted=parted,
    )


def test_every_token_has_to_be_excused_by_both_bounds() -> None:
    found = judge(0, evidence([0.0, 0.1, 0.0], [0.0, 0.0, 0.01]), LIMITS, str)
    plain = found.runs[0]
    assert (found.verdict, plain.near_ties, plain.faults) == ("near tie", 2, ())
    assert (found.smallest_margin, found.close_calls) == (0.05, 2)
    by_torch = judge(0, evidence([0.0, 0.11, 0.0], [0.0, 0.0, 0.0]), LIMITS, str)
    assert (by_torch.verdict, by_torch.runs[0].faults, by_torch.runs[0].worst_shortfall) == (
        "bug",
        (1,),
        0.11,
    )
    by_itself = judge(0, evidence([0.0, 0.0, 0.05], [0.0, 0.0, 0.05]), LIMITS, str)
    assert (by_itself.verdict, by_itself.runs[0].faults) == ("bug", (2,))
    assert by_itself.runs[0].worst_own_shortfall == 0.05


def test_difference_shows_both_tokens_and_what_pytorch_thinks() -> None:
    parted = Measured(("plain", "PyTorch"), 1, (5, 6), ((6, 2.5), (7, 2.25)), (0.3, 0.0))
    (item,) = judge(
        0, evidence([0.0] * 3, [0.0] * 3, (parted,)), LIMITS, lambda token: f"<{token}>"
    ).differences
    assert (item.token, item.position) == (1, 3)
    assert [(token.id, token.text) for token in item.tokens if token] == [(5, "<5>"), (6, "<6>")]
    assert [(token.id, token.logit) for token in item.top_two] == [(6, 2.5), (7, 2.25)]
    assert (item.margin, item.shortfall, item.verdict) == (0.25, 0.3, "bug")
    (tie,) = judge(
        0, evidence([0.0], [0.0], (replace(parted, shortfalls=(0.1, 0.0)),)), LIMITS, str
    ).differences
    assert tie.verdict == "near tie"


def test_a_run_that_ended_while_another_goes_on_is_a_bug() -> None:
    parted = Measured(("plain", "PyTorch"), 3, (None, 6), ((6, 2.5), (7, 2.25)), (0.0, 0.0))
    found = judge(0, evidence([0.0] * 3, [0.0] * 3, (parted,)), LIMITS, str)
    assert (found.verdict, found.differences[0].tokens[0]) == ("bug", None)
