"""The benchmark: how it runs systems, what it computes from their times, and what it prints and draws."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dflash_bench.floor import StepFloor
from dflash_bench.interleave import measure
from dflash_bench.plots import check_plot
from dflash_bench.prompts import default_prompts
from dflash_bench.report import Conditions
from dflash_bench.run.measure import run_bench
from dflash_bench.run.plot import draw_plot
from dflash_bench.run.report import BenchReport, render
from dflash_bench.systems import own
from dflash_bench.systems.base import Outcome, System
from dflash_bench.systems.own import OwnSystem, own_systems
from dflash_rt import Bundle
from dflash_rt.backends.scripted import ScriptedBackend
from dflash_rt.errors import (
    ContextLengthError,
    OutputError,
    PromptError,
    RequestError,
)
from tests.bench.parts import Other, answers, bundle_with_graphs
from tests.rt.bundle_maker import manifest_document, write_bundle
from tests.rt.scripted_generator import scripted_generator

ROOT = Path(__file__).parents[2]
ANSWER = "Blue light is scattered more than red light."
PROMPT = [1]
PNG = b"\x89PNG\r\n\x1a\n"


def own_system(num_draft_tokens: int) -> OwnSystem:
    return OwnSystem(scripted_generator(ANSWER, prompt=PROMPT, num_draft_tokens=num_draft_tokens))


def conditions(**changes: Any) -> Conditions:
    values: dict[str, Any] = {
        "bundle": "tiny",
        "precision": "fp32",
        "backend": "scripted",
        "threads": 2,
        "prompt_tokens": (1, 1),
        "max_new_tokens": 30,
        "repeats": 3,
        "created": "2026-11-23T12:00:00Z",
        "cpu": "a processor",
        "packages": {"numpy": "2.0"},
        "load_before": 0.25,
        "load_after": 1.5,
    }
    return Conditions(**(values | changes))


@pytest.fixture(scope="module")
def report() -> BenchReport:
    """Two widths of a scripted backend and two others, one of which goes astray."""
    plain = own_system(0)
    answer = plain.decode(PROMPT, 30).token_ids
    systems: list[System] = [
        plain,
        own_system(2),
        own_system(4),
        Other("hf", answer),
        Other("reference-2", [*answer[:4], 7, *answer[5:]], num_draft_tokens=2),
    ]
    outcomes = measure(systems, [PROMPT, PROMPT], max_new_tokens=30, repeats=3, pause_seconds=0)
    return BenchReport(
        conditions=conditions(),
        outcomes=outcomes,
        num_draft_tokens={s.name: s.num_draft_tokens for s in systems if s.num_draft_tokens is not None},
        floors={"plain": StepFloor(4 * 10**6, 10**6), "drafted-4": StepFloor(5 * 10**6, 10**7)},
        bytes_per_second=1e9,
        skipped={"genai": "genai can't be compared with (onnxruntime-genai isn't installed)"},
    )


# --- Running ---


def test_every_system_decodes_everything_in_turn() -> None:
    diary: list[Any] = []
    systems = [Other(name, range(9), diary=diary) for name in "abc"]
    outcomes = measure(systems, [[1], [2]], max_new_tokens=9, repeats=2, pause_seconds=0)
    assert {name: set(done) for name, done in outcomes.items()} == {
        name: {(0, 0), (1, 0), (0, 1), (1, 1)} for name in "abc"
    }
    warm_up, rounds = diary[:3], [diary[at : at + 3] for at in range(3, len(diary), 3)]
    assert warm_up == [(name, (1,), 8) for name in "abc"]
    assert ["".join(name for name, _, _ in turn) for turn in rounds] == ["abc", "bca", "cab", "abc"]
    assert [{prompt for _, prompt, _ in turn} for turn in rounds] == [{(1,)}, {(2,)}, {(1,)}, {(2,)}]
    assert {count for _, _, count in diary[3:]} == {9}


class Stepper(Other):
    """One that can stop between two steps of ``tokens`` tokens."""

    def __init__(self, name: str, answer: Sequence[int], tokens: int, diary: list[Any], apart: bool) -> None:
        super().__init__(name, answer, diary=diary)
        self.tokens = tokens
        self.apart = apart

    def start(self, prompt: Sequence[int], max_new_tokens: int) -> Any:
        return Steps(self, len(self.answer[:max_new_tokens]))


class Steps:
    def __init__(self, stepper: Stepper, count: int) -> None:
        self.stepper, self.count, self.tokens = stepper, count, 0

    def advance(self) -> bool:
        if self.tokens == self.count:
            return False
        self.stepper.diary.append((self.stepper.name, self.tokens))
        self.tokens = min(self.tokens + self.stepper.tokens, self.count)
        return True

    @property
    def outcome(self) -> Outcome:
        assert self.tokens == self.count
        return Outcome(self.stepper.answer[: self.count], 0.5, 2.0, steps=self.count)


def test_those_that_are_apart_take_turns_step_by_step() -> None:
    diary: list[Any] = []
    systems: list[System] = [
        Stepper("a", range(4), 1, diary, apart=True),
        Other("x", range(4), diary=diary),
        Stepper("b", range(6), 2, diary, apart=True),
        Stepper("c", range(4), 2, diary, apart=False),
    ]
    outcomes = measure(systems, [PROMPT, PROMPT], max_new_tokens=6, repeats=1, pause_seconds=0)
    turns = [entry[:2] for entry in diary[4:]]  # after the warm-up
    # Whoever has the fewest tokens; of equal ones the first.
    together = [("a", 0), ("b", 0), ("a", 1), ("a", 2), ("b", 2), ("a", 3), ("b", 4)]
    whole = ("x", tuple(PROMPT)), ("c", tuple(PROMPT))
    assert turns[:9] == [*together, *whole]
    # The next prompt begins with the next system: those that are apart where the first of them was.
    assert turns[9] == whole[0]
    assert turns[10:12] == [("b", 0), ("a", 0)]
    assert [set(done) for done in outcomes.values()] == [{(0, 0), (1, 0)}] * 4
    assert outcomes["b"][1, 0].token_ids == tuple(range(6))


def test_progress_tells_rates() -> None:
    lines: list[str] = []
    systems = [Other("fast", range(9)), Other("mute", [1])]
    measure(systems, [[1]], max_new_tokens=9, repeats=2, say=lines.append, pause_seconds=0)
    assert lines == [f"repeat {n}/2, prompt 1/1: fast 4.0, mute -" for n in (1, 2)]


@pytest.mark.parametrize("count", [0, 1, 4])
def test_own_system_reports_the_requests_statistics(count: int) -> None:
    system = own_system(count)
    outcome = system.decode(PROMPT, 20)
    assert outcome.token_ids == own_system(0).decode(PROMPT, 20).token_ids
    assert len(outcome.token_ids) == 20
    expected = ("plain", None) if count == 0 else (f"drafted-{count}", count)
    assert (system.name, system.num_draft_tokens) == expected
    assert outcome.accepted_per_step is not None
    assert outcome.stage_seconds is not None
    assert outcome.steps == len(outcome.accepted_per_step)
    assert (outcome.steps == 19) == (count == 0)
    assert 0 < outcome.stage_seconds["step"] < outcome.decode_seconds
    system.close()


# --- The report ---


def test_table_has_every_row(report: BenchReport) -> None:
    table = render(report)
    sections = table.split("\n\n")
    speeds = next(s for s in sections if "first token" in s).splitlines()
    assert [line.split()[0] for line in speeds[1:]] == [
        "plain",
        "drafted-2",
        "drafted-4",
        "hf",
        "reference-2",
    ]
    ratios = next(s for s in sections if s.startswith("tokens/s of")).splitlines()
    assert ratios[0].split()[4:] == ["plain", "hf", "reference-2"]
    assert [line.split()[0] for line in ratios[1:4]] == ["plain", "drafted-2", "drafted-4"]
    assert "2 prompts of 1 to 1 tokens, at most 30 new tokens, 3 repeats; load 0.2 before, 1.5 after" in table
    assert "genai was skipped: genai can't be compared with" in table
    assert "reference-2 gave other tokens than plain in 6 of 6 answers" in table
    assert "hf gave other" not in table
    for rows in map(str.splitlines, sections):
        aligned = [
            row
            for row in rows
            if row.startswith(("plain", "drafted", "hf", "reference")) and "gave" not in row
        ]
        assert len({len(row) for row in aligned}) <= 1


def test_table_without_others_has_no_empty_section() -> None:
    systems = [own_system(0), own_system(4)]
    outcomes = measure(systems, [PROMPT], max_new_tokens=20, repeats=1, pause_seconds=0)
    found = BenchReport(conditions=conditions(), outcomes=outcomes, num_draft_tokens={"drafted-4": 4})
    table = render(found)
    assert "tokens/s of" not in table
    assert "floor" not in table
    assert "skipped" not in table
    assert "drafted-4" in table


def test_numbers_of_the_report_agree(report: BenchReport) -> None:
    found = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    hf, drafted = found["systems"]["hf"], found["systems"]["drafted-4"]
    assert (hf["tokens_per_second"], hf["ms_per_step"], hf["first_token_ms"]) == (
        14.5,
        pytest.approx(2000 / 29, 1e-5),
        500,
    )
    assert (hf["equal_tokens"], hf["compared_tokens"], hf["equal_answers"], hf["answers"]) == (180, 180, 6, 6)
    assert found["systems"]["reference-2"]["equal_tokens"] == 6 * 4
    assert drafted["equal_answers"] == 6
    assert drafted["tokens_per_step"] == pytest.approx(drafted["decoded_tokens"] / drafted["steps"], rel=1e-5)
    assert len(drafted["accepted_by_position"]) == 4
    gain = found["drafting"]["drafted-4"]
    assert gain["expected_gain"] == pytest.approx(
        gain["tokens_per_step"] / gain["step_cost"]["median"], rel=1e-4
    )
    assert gain["measured_gain"] == found["ratios"]["drafted-4"]["plain"]
    assert gain["measured_gain"]["pairs"] == 6
    floor = found["floor"]["plain"]
    assert floor["floor_ms"] == 4
    assert floor["floor_share"] == pytest.approx(4 / found["systems"]["plain"]["ms_per_step"], rel=1e-4)
    assert floor["operations_per_second"] == pytest.approx(
        1e9 / found["systems"]["plain"]["ms_per_step"], rel=1e-4
    )
    assert found["prompts"] == 2


def key_paths(value: object, names: set[str]) -> Iterator[str]:
    """Dotted keys as the documentation writes them: a system's name is ``*``, a ratio ends the path."""
    if not isinstance(value, dict) or "median" in value:
        return
    for key, item in value.items():
        inner = list(key_paths(item, names))
        if key in names:
            yield from (f"*.{path}" for path in inner)
        elif key in ("packages", "stage_ms", "skipped", "ratios"):
            yield key
        else:
            yield key
            yield from (f"{key}.{path}" for path in inner)


def test_documentation_has_every_key_and_no_other(report: BenchReport) -> None:
    text = (ROOT / "docs" / "reference" / "benchmark.md").read_text(encoding="utf-8")
    table = text[text.index("## The JSON object") : text.index("## The plot")]
    first_cells = re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE)
    documented = {key for cell in first_cells for key in re.findall(r"`([\w.*]+)`", cell)}
    assert documented == set(key_paths(report.to_dict(), set(report.outcomes)))


def test_what_was_not_measured_is_null() -> None:
    outcomes = {"plain": answers((1,)), "drafted-2": answers((1,)), "hf": answers((1,))}
    silent = BenchReport(
        conditions=conditions(load_before=None, load_after=None),
        outcomes=outcomes,
        num_draft_tokens={"drafted-2": 2},
        floors={"plain": StepFloor(1, 1)},
        bytes_per_second=1.0,
    )
    found = json.loads(json.dumps(silent.to_dict(), allow_nan=False))
    row = found["systems"]["plain"]
    for key in ("tokens_per_second", "ms_per_step", "tokens_per_step", "outside_share", "stage_ms"):
        assert row[key] is None
    assert found["floor"]["plain"]["floor_share"] is None
    assert "load" not in render(silent)
    assert re.search(r"^plain +- +- +- +1000 ms +- +all$", render(silent), re.MULTILINE)


# --- The plot ---


def test_plot_is_a_png(report: BenchReport, tmp_path: Path) -> None:
    path = check_plot(tmp_path / "reports" / "bench.png")
    assert not path.exists()
    draw_plot(report, path)
    assert path.read_bytes().startswith(PNG)
    before = path.read_bytes()
    assert check_plot(path).read_bytes() == before  # checking leaves an older plot alone
    draw_plot(report, path)


def test_plot_of_a_run_without_steps(tmp_path: Path) -> None:
    silent = BenchReport(conditions=conditions(), outcomes={"plain": answers((1,))}, num_draft_tokens={})
    draw_plot(silent, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(PNG)


def test_plot_needs_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    with pytest.raises(RequestError, match="a plot needs matplotlib") as caught:
        check_plot(tmp_path / "x.png")
    assert "pip install 'dflash-export[bench]'" in str(caught.value)


@pytest.mark.parametrize("name", ["plot.jpg", "plot", "png"])
def test_plot_has_to_be_called_png(name: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"a name that ends in \.png"):
        check_plot(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_plot_that_cannot_be_written(tmp_path: Path, report: BenchReport) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="can't be written"):
        check_plot(tmp_path / "file" / "x.png")
    (tmp_path / "x.png").mkdir()
    with pytest.raises(OutputError, match="can't be written"):
        check_plot(tmp_path / "x.png")
    with pytest.raises(OutputError, match="choose another path"):
        draw_plot(report, tmp_path / "x.png")


# --- Arguments ---


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"repeats": 0}, "repeats is wrong"),
        ({"max_new_tokens": 1}, "at least 2: the first token is the prefill's"),
        ({"max_new_tokens": True}, "max_new_tokens is wrong"),
        ({"num_draft_tokens": (0,)}, "num_draft_tokens is wrong"),
        ({"num_draft_tokens": (2, 4)}, "1 to 3, what the drafter drafts at most"),
        ({"num_draft_tokens": ("3",)}, "num_draft_tokens is wrong"),
        ({"threads": 0}, "threads is wrong"),
        ({"plot": "plot.jpg"}, "a name that ends in .png"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_loaded(
    arguments: dict[str, Any], part: str, tmp_path: Path
) -> None:
    bundle = write_bundle(tmp_path / "bundle")  # its graphs aren't ONNX: loading one would be another error
    with pytest.raises(RequestError, match=re.escape(part)):
        run_bench(bundle, **arguments)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bundle:
    """A bundle whose backend is a script that counts upwards."""
    from dflash_bench.run import measure as run

    def count_up(prefix: tuple[int, ...]) -> int:
        return 3 + (prefix[-1] + 1) % 20

    def make(
        name: str, bundle: Bundle, *, threads: int | None = None, options: object = None
    ) -> ScriptedBackend:
        assert (name, threads) == ("onnxruntime", 1)
        return ScriptedBackend(count_up, block_size=4, prefill_chunk=8, max_rows=64)

    monkeypatch.setattr(own, "create_backend", make)
    monkeypatch.setattr(run, "measure_read_bandwidth", lambda threads: 1e9 * threads)
    return bundle_with_graphs(tmp_path / "scripted")


def test_a_whole_run(scripted: Bundle, tmp_path: Path) -> None:
    lines: list[str] = []
    report = run_bench(
        scripted,
        prompts=[[5, 6, 7], [8]],
        max_new_tokens=12,
        repeats=2,
        threads=1,
        num_draft_tokens=(3, 1, 3),
        plot=tmp_path / "bench.png",
        progress=lines.append,
    )
    assert list(report.outcomes) == ["plain", "drafted-3", "drafted-1"]
    assert report.conditions.prompt_tokens == (3, 1)
    assert list(report.floors) == ["plain", "drafted-3", "drafted-1"]
    assert all(same.exact for same in report.agreements.values())
    assert report.summaries["drafted-3"].tokens_per_step == pytest.approx(11 / 3)
    assert (tmp_path / "bench.png").read_bytes().startswith(PNG)
    assert lines[0] == "loading tiny"
    rate = r"[0-9.]+"
    assert re.fullmatch(f"repeat 1/2, prompt 1/2: plain {rate}, drafted-3 {rate}, drafted-1 {rate}", lines[1])
    assert lines[-1] == f"wrote {tmp_path / 'bench.png'}"
    json.dumps(report.to_dict(), allow_nan=False)


def test_own_systems_are_apart_only_where_a_backend_shares_its_weights(
    scripted: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(stack: contextlib.ExitStack) -> list[OwnSystem]:
        return own_systems(scripted, (0, 2), "onnxruntime", None, 1, stack)

    with contextlib.ExitStack() as stack:
        same = make(stack)
        assert [one.apart for one in same] == [False, False]
        assert same[0].generator._backend is same[1].generator._backend
    others = list[ScriptedBackend]()

    def share_weights(self: ScriptedBackend) -> ScriptedBackend:
        others.append(ScriptedBackend(lambda prefix: 1))
        return others[-1]

    monkeypatch.setattr(ScriptedBackend, "share_weights", share_weights)
    with contextlib.ExitStack() as stack:
        apart = make(stack)
        assert [one.apart for one in apart] == [True, True]
        assert [one.generator._backend for one in apart] == others
    assert [one.closed for one in others] == [True, True]


def test_prompts_are_refused_before_the_run(scripted: Bundle) -> None:
    for prompts, error in (([], PromptError), ([[]], PromptError), ([[1], [32]], PromptError)):
        with pytest.raises(error):
            run_bench(scripted, prompts=prompts, threads=1, max_new_tokens=4)
    lines: list[str] = []
    with pytest.raises(ContextLengthError):
        run_bench(scripted, prompts=[[1], [2] * 61], threads=1, max_new_tokens=4, progress=lines.append)
    assert lines == ["loading tiny"]


def test_default_prompts_suit_the_bundle(tmp_path: Path) -> None:
    document = manifest_document()
    chats = default_prompts(Bundle.open(write_bundle(tmp_path / "chat", document)))
    assert all(isinstance(chat, list) and chat[0]["role"] == "user" for chat in chats)  # type: ignore[index]
    document["tokenizer"]["chat_template"] = None
    texts = default_prompts(Bundle.open(write_bundle(tmp_path / "text", document)))
    assert all(isinstance(text, str) for text in texts)
    document["tokenizer"] = None
    without = Bundle.open(write_bundle(tmp_path / "ids", document))
    ids = np.array(default_prompts(without))
    assert ids.min() >= 0
    assert ids.max() < 32
    assert default_prompts(without) == default_prompts(without)
