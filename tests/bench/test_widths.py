"""``dflash-bench widths``: what it computes, prints and draws."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dflash_bench.prompts import mixed_prompts
from dflash_bench.report import Conditions
from dflash_bench.systems.base import Outcome
from dflash_bench.systems.own import ADAPTIVE
from dflash_bench.widths.measure import _some_counts, run_widths
from dflash_bench.widths.plot import draw_widths
from dflash_bench.widths.report import WidthsReport, render, shares_text
from dflash_rt.backends.scripted import ScriptedBackend
from dflash_rt.bundle.folder import Bundle
from dflash_rt.errors import OutputError, PromptError, RequestError
from dflash_rt.sampling.params import SamplingParams
from dflash_rt.speculation.width_correction import StepCosts
from tests.rt.bundle_maker import manifest_document, write_bundle

PNG = b"\x89PNG\r\n\x1a\n"
CONDITIONS = Conditions(
    bundle="tiny",
    precision="fp32",
    backend="scripted",
    threads=1,
    prompt_tokens=(3, 4),
    max_new_tokens=9,
    repeats=2,
    created="2026-11-23T12:00:00Z",
    cpu="some CPU",
    packages={},
)


def outcome(seconds: float, *steps: tuple[int, int], first: int = 0) -> Outcome:
    """``steps`` are widths and accepted drafts; the tokens are the same for the same number of them."""
    new = sum(accepted + 1 for _, accepted in steps)
    return Outcome(
        token_ids=tuple(range(first, first + new + 1)),
        prefill_seconds=0.1,
        decode_seconds=seconds,
        steps=len(steps),
        accepted_per_step=tuple(accepted for _, accepted in steps),
        stage_seconds={"step": seconds},
        drafted_per_step=tuple(width - 1 for width, _ in steps),
    )


def report(**changes: Any) -> WidthsReport:
    """Two prompts, the second one sampled: drafts help with the first and never with the second."""
    plain = [(1, 0)] * 8
    outcomes = {
        "plain": {(0, 0): outcome(8, *plain), (0, 1): outcome(10, *plain), (1, 0): outcome(8, *plain)},
        "drafted-3": {
            (0, 0): outcome(4, (4, 3), (4, 3)),
            (0, 1): outcome(5, (4, 3), (4, 3)),
            (1, 0): outcome(16, *[(4, 0)] * 8),
        },
        ADAPTIVE: {
            (0, 0): outcome(4, (4, 3), (4, 3)),
            (0, 1): outcome(4, (4, 3), (2, 1), (2, 1)),
            (1, 0): outcome(8.5, (4, 0), *plain[1:], first=5),
        },
    }
    values = {
        "conditions": CONDITIONS,
        "kinds": ("question", "noise"),
        "sampled": (False, True),
        "outcomes": outcomes,
        "num_draft_tokens": {"plain": 0, "drafted-3": 3},
        "costs": StepCosts((1.0, 1.5, 1.75, 2.0)),
    }
    return WidthsReport(**{**values, **changes})


def test_numbers_by_hand() -> None:
    found = report()
    assert found.over_plain == {
        "question": pytest.approx((8 / 4 + 10 / 4) / 2),
        "noise": pytest.approx(8 / 8.5),
    }
    assert found.chosen() == {0: 7 / 13, 1: 2 / 13, 3: 4 / 13}
    assert found.chosen(0) == {1: 2 / 5, 3: 3 / 5}
    assert found.accepted(ADAPTIVE) == [5 / 6, 3 / 4, 3 / 4]  # of the steps that drafted that far
    assert found.accepted("plain") == []
    # 8 tokens for 2 steps at 2.0 plain steps, 8 for 2.0 + 2 * 1.5, 8 for 2.0 + 7.
    assert found.by_costs(ADAPTIVE) == pytest.approx(24 / (4 + 5 + 9))
    assert found.by_costs(ADAPTIVE, 1) == pytest.approx(8 / 9)
    assert found.by_costs("plain") == 1
    # Of the repeats the lower median: 8 s and 4 s for the first prompt.
    assert found.best_fixed == "plain"
    assert found.over_best_fixed == pytest.approx((16 / 12.5) / (16 / 16))
    assert found.rate("plain", 0) == pytest.approx((8 / 8 + 8 / 10) / 2)


def test_greedy_and_sampled_answers_are_told_apart() -> None:
    found = report()
    assert found.agreement(sampled=False).exact
    assert (found.agreement(sampled=True).equal_answers, found.agreement(sampled=True).answers) == (1, 2)
    assert "greedy: 4 of 4 answers as in plain decoding\n" in render(found)
    assert "sampled: 1 of 2 answers" in render(found)
    assert ": a near tie, or a bug" in render(report(sampled=(True, False)))


def test_table() -> None:
    lines = render(report()).splitlines()
    assert lines[0] == "tiny (fp32) on scripted, 1 threads, some CPU"
    assert lines[3].split() == [
        "cost",
        "at",
        "load",
        "cost",
        "in",
        "the",
        "run",
        *["tokens/step", "tokens/s", "over", "plain"],
    ]
    assert lines[5].startswith("drafted-3  2000.0 ms, 2.00")
    assert "adaptive         83%  75%  75%" in lines
    question = next(line for line in lines if line.startswith("question"))
    assert question.endswith("1: 40%, 3: 60%")
    assert "adaptive over plain: at least 0.941 (noise)" in lines
    assert "adaptive over plain by costs: at least 0.889 (noise)" in lines
    assert "adaptive over the best fixed number (plain), all prompts: 1.280" in lines


def test_json() -> None:
    told = report().to_dict()
    json.dumps(told, allow_nan=False)
    assert told["load_cost_ms"] == [1000, 1500, 1750, 2000]
    assert told["prompts"][0]["steps_by_draft_tokens"] == {"1": 0.4, "3": 0.6}
    assert told["greedy_answers"] == {"equal": 4, "all": 4}
    assert told["best_fixed"] == "plain"
    assert told["lowest_over_plain"] == pytest.approx(8 / 8.5, rel=1e-5)


def test_an_answer_without_steps_has_no_rate() -> None:
    outcomes = {name: {(0, 0): outcome(0.0)} for name in ("plain", "drafted-3", ADAPTIVE)}
    found = report(outcomes=outcomes, kinds=("short",), sampled=(False,))
    assert found.over_plain == {}
    assert found.over_best_fixed is None
    assert "short" in render(found)
    json.dumps(found.to_dict(), allow_nan=False)


def test_the_three_widths_chosen_most() -> None:
    assert shares_text({1: 0.1, 2: 0.05, 4: 0.6, 8: 0.25}) == "1: 10%, 4: 60%, 8: 25%"


def test_plot(tmp_path: Path) -> None:
    path = tmp_path / "widths.png"
    draw_widths(report(), path)
    assert path.read_bytes().startswith(PNG)
    with pytest.raises(OutputError, match="can't be written"):
        draw_widths(report(), tmp_path / "missing" / "widths.png")


@pytest.mark.parametrize(
    ("block_size", "counts"),
    [(2, [1]), (5, [1, 2, 3, 4]), (8, [1, 2, 3, 5, 7]), (16, [1, 2, 3, 5, 7, 11, 15])],
)
def test_draft_tokens_that_are_measured(block_size: int, counts: list[int]) -> None:
    assert _some_counts(block_size) == counts


# Whole runs


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bundle:
    """A bundle without tokenizer whose backend counts upwards, or samples when it is asked to."""

    def logits(prefix: tuple[int, ...]) -> list[float]:
        return [4.0 * (token == (prefix[-1] + 1) % 30) for token in range(32)]

    def make(
        name: str, bundle: Bundle, *, threads: int | None = None, options: object = None
    ) -> ScriptedBackend:
        return ScriptedBackend.with_logits(logits, block_size=4, prefill_chunk=8, max_rows=64)

    monkeypatch.setattr("dflash_bench.systems.own.create_backend", make)
    document = manifest_document()
    document["tokenizer"] = None
    return Bundle.open(write_bundle(tmp_path / "scripted", document))


def test_a_whole_run_over_the_mix(scripted: Bundle, tmp_path: Path) -> None:
    lines: list[str] = []
    plot = tmp_path / "widths.png"
    found = run_widths(scripted, max_new_tokens=16, repeats=1, threads=1, plot=plot, progress=lines.append)
    assert list(found.outcomes) == ["plain", "drafted-1", "drafted-2", "drafted-3", ADAPTIVE]
    assert len(found.kinds) == len(set(found.kinds)) == 12
    assert sum(found.sampled) == 3
    assert found.costs.widest == 4
    assert found.agreement(sampled=False).exact
    assert found.agreement(sampled=True).exact  # nothing is rounded here
    assert plot.read_bytes().startswith(PNG)
    assert lines[0] == "loading tiny"
    assert lines[-1] == f"wrote {plot}"


def test_given_prompts_and_draft_tokens(scripted: Bundle) -> None:
    found = run_widths(
        scripted, prompts=[[1, 2], [3]], max_new_tokens=8, repeats=2, threads=1, num_draft_tokens=[2]
    )
    assert list(found.num_draft_tokens) == ["plain", "drafted-2"]
    assert found.kinds == ("prompt 1", "prompt 2")
    assert found.conditions.prompt_tokens == (2, 1)
    assert set(found.outcomes[ADAPTIVE]) == {(0, 0), (0, 1), (1, 0), (1, 1)}


@pytest.mark.parametrize(
    ("arguments", "error", "part"),
    [
        ({"repeats": 0}, RequestError, "repeats is wrong"),
        ({"max_new_tokens": 1}, RequestError, "at least 2"),
        ({"num_draft_tokens": [4]}, RequestError, "1 to 3"),
        ({"threads": 0}, RequestError, "threads is wrong"),
        ({"plot": "widths.jpg"}, RequestError, "ends in .png"),
        ({"prompts": []}, PromptError, "no prompt"),
    ],
)
def test_wrong_arguments(
    scripted: Bundle, arguments: dict[str, Any], error: type[Exception], part: str
) -> None:
    with pytest.raises(error, match=part):
        run_widths(scripted, **{"max_new_tokens": 8, "threads": 1, **arguments})


def test_the_mix_suits_the_bundle(tmp_path: Path) -> None:
    def mix(change: Callable[[dict[str, Any]], None]) -> list[tuple[str, Any, SamplingParams]]:
        document = manifest_document()
        change(document)
        return mixed_prompts(
            Bundle.open(write_bundle(tmp_path / str(len(list(tmp_path.iterdir()))), document))
        )

    def no_template(document: dict[str, Any]) -> None:
        document["tokenizer"]["chat_template"] = None

    chats = mix(lambda document: None)
    assert {type(prompt) for _, prompt, _ in chats} == {list, str}
    texts = mix(no_template)
    assert {type(prompt) for _, prompt, _ in texts} == {str}
    assert [sampling for _, _, sampling in texts] == [sampling for _, _, sampling in chats]
    assert {sampling.seed is not None for _, _, sampling in chats if sampling.temperature > 0} == {True}
    ids = mix(lambda document: document.update(tokenizer=None))
    assert all(0 <= token < 32 for _, prompt, _ in ids for token in prompt)
