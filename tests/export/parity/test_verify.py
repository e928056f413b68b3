"""Parity runs on tiny random pairs: right bundles pass, and each way of breaking one is caught and named."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import numpy_helper
from tokenizers import Tokenizer, models, pre_tokenizers

from dflash_export import build, verify
from dflash_export.cli import main
from dflash_export.errors import SourceError, VerifyError
from dflash_export.parity.report import VerifyReport
from dflash_export.parity.table import render
from dflash_rt import Bundle
from dflash_rt.errors import ContextLengthError, IntegrityError, OutputError, PromptError, RequestError
from tests.pairs import TargetSpec, drafter_config, make_drafter, make_target

# One architecture for all, so that it is traced once.
SPEC = TargetSpec("qwen3", tied=False, vocab=12, layers=3)
PROMPTS = [[5], [1, 2, 3, 4, 5, 6, 7, 8, 9], [3, 3, 3, 0]]
TEMPLATE = "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads cost more than they help on models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Pair:
    """A bundle and the checkpoints it was built from."""

    bundle: Bundle
    target: Path
    drafter: Path

    def verify(self, bundle: Bundle | Path | None = None, **options: Any) -> VerifyReport:
        defaults = {"prompts": PROMPTS, "max_new_tokens": 16, "threads": 1}
        sources = {"target": self.target, "drafter": self.drafter}
        return verify(bundle or self.bundle, **{**defaults, **sources, **options})


def export(folder: Path, target: Path, drafter: Path, **options: Any) -> Pair:
    sizes = {"prefill_chunk": 4, "num_draft_tokens": 2, "max_seq_len": 96}
    return Pair(build(target, drafter, folder / "bundle", **{**sizes, **options}), target, drafter)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Takes token ids only. One stop token, so that some answers end early."""
    folder = tmp_path_factory.mktemp("pair")
    make_target(folder / "target", SPEC, seed=3)
    # Some repositories ship sampling defaults, which change greedy decoding in transformers if left in place.
    defaults = {"eos_token_id": [4], "repetition_penalty": 3.0, "no_repeat_ngram_size": 2}
    (folder / "target" / "generation_config.json").write_text(json.dumps(defaults))
    make_drafter(folder / "drafter", drafter_config(SPEC))
    return export(folder, folder / "target", folder / "drafter")


@pytest.fixture(scope="module")
def report(pair: Pair) -> VerifyReport:
    return pair.verify()


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Takes texts and chats, of which it knows a few words."""
    folder = tmp_path_factory.mktemp("talking")
    make_target(folder / "target", SPEC, seed=6)
    words = ["?", "Why", "is", "the", "sky", "Hi", "user", ":", "of", "in", "def", "Ferry"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "target" / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
    (folder / "target" / "tokenizer_config.json").write_text(json.dumps(settings))
    make_drafter(folder / "drafter", drafter_config(SPEC))
    return export(folder, folder / "target", folder / "drafter", prefill_chunk=150, max_seq_len=1024)


# --- Breaking bundles ---


def altered(bundle: Bundle, output: Path, change: Callable[[Path], None]) -> Path:
    """A changed copy whose manifest records the files as they are now, so that no hash gives it away."""
    shutil.copytree(bundle.root, output, ignore=shutil.ignore_patterns("reports"))
    change(output)
    manifest = json.loads((output / "manifest.json").read_text())
    for name in manifest["files"]:
        data = (output / name).read_bytes()
        manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (output / "manifest.json").write_text(json.dumps(manifest))
    return output


def change_floats(name: str, change: Callable[[np.ndarray], None]) -> Callable[[Path], None]:
    """Change a data file, seen as one float32 array."""

    def apply(folder: Path) -> None:
        values = np.fromfile(folder / name, np.float32)
        change(values)
        values.tofile(folder / name)

    return apply


def change_manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        change(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return apply


def change_rope(folder: Path) -> None:
    """Rotary frequencies 1 % too high, as another base would make them."""
    model = onnx.load(folder / "target.onnx", load_external_data=False)
    (frequencies,) = (item for item in model.graph.initializer if "inv_freq" in item.name)
    if frequencies.data_location == onnx.TensorProto.EXTERNAL:
        where = {item.key: item.value for item in frequencies.external_data}
        start, count = int(where["offset"]) // 4, int(where["length"]) // 4

        def raise_them(values: np.ndarray) -> None:
            values[start : start + count] *= 1.01

        change_floats(where["location"], raise_them)(folder)
        return
    frequencies.CopyFrom(
        numpy_helper.from_array(numpy_helper.to_array(frequencies) * np.float32(1.01), frequencies.name)
    )
    onnx.save(model, folder / "target.onnx")


def change_choice(folder: Path) -> None:
    """The head's logits stay right; the tokens it reports are those of the smallest ones."""
    model = onnx.load(folder / "lm_head.onnx", load_external_data=False)
    (choice,) = (node for node in model.graph.node if node.op_type == "ArgMax")
    choice.op_type = "ArgMin"
    onnx.save(model, folder / "lm_head.onnx")


# --- A right bundle ---


def test_right_bundle(report: VerifyReport) -> None:
    assert (report.ok, report.verdict) == (True, "equal")
    assert (report.problems, report.warnings) == ((), ())
    for prompt, ids in zip(report.prompts, PROMPTS, strict=True):
        assert prompt.prompt_token_ids == tuple(ids)
        assert (prompt.verdict, prompt.differences, prompt.close_calls) == ("equal", (), 0)
        assert [run.name for run in prompt.runs] == ["width 4", "width 3", "plain", "PyTorch"]
        assert len({run.token_ids for run in prompt.runs}) == 1
        plain = prompt.runs[2]
        assert (plain.width, plain.accepted_per_step) == (1, (0,) * (len(plain.token_ids) - 1))
        for run in prompt.runs:
            assert run.equal_to_pytorch == len(run.token_ids)
            assert (run.worst_logit_gap, run.near_ties, run.faults) == (0.0, 0, ())


def test_some_answers_are_stopped_and_some_are_not(report: VerifyReport) -> None:
    runs = [run for prompt in report.prompts for run in prompt.runs if run.name == "plain"]
    assert {run.finish_reason for run in runs} == {"stop", "length"}


def test_every_logit_is_measured_in_every_pass_shape(report: VerifyReport) -> None:
    rows = sum(len(prompt.runs[0].token_ids) for prompt in report.prompts)
    assert set(report.logit_errors) == {4, 3, 1}
    for stats in (*report.logit_errors.values(), *report.shape_errors.values(), report.pytorch_repeated):
        assert (stats.rows, stats.values) == (rows, rows * SPEC.vocab)
    for stats in report.logit_errors.values():
        assert 0 < stats.rms <= stats.max_abs < 1e-4
        assert report.limits.allow(stats)
    worst_error = max(stats.max_abs for stats in report.logit_errors.values())
    assert report.limits.near_tie == 2 * max(worst_error, report.pytorch_repeated.max_abs) < 1e-4
    assert report.pytorch_16_bit is None
    assert not report.limits.mixture


def test_features_and_drafting(report: VerifyReport) -> None:
    assert [item.layer for item in report.features] == [0, 2]
    assert all(0 < item.rms <= item.worst < 1e-5 for item in report.features)
    assert [item.width for item in report.drafting] == [4, 3]
    for item in report.drafting:
        assert len(item.accepted_by_position) == item.width - 1
        assert item.steps > 0
    reference = report.reference
    assert (reference.skipped, reference.version, reference.width) == (None, "0.1.0", 4)
    assert reference.tokens_per_step == reference.our_tokens_per_step == report.drafting[0].tokens_per_step
    assert reference.same == reference.compared == report.drafting[0].steps


def test_steps_agree_with_the_reference_up_to_the_end(pair: Pair) -> None:
    """Whose loop clips its last blocks, which changes the drafts in them: here that is every block."""
    prompts = [[i, j] for i in range(SPEC.vocab) for j in (0, 5, 7)]
    found = pair.verify(prompts=prompts, max_new_tokens=3, write_report=False).reference
    assert found.same == found.compared
    assert found.compared is not None
    assert found.compared > 36


def test_report_is_written_into_the_bundle(pair: Pair, report: VerifyReport) -> None:
    written = json.loads((pair.bundle.root / "reports" / "verify.json").read_text())
    assert written == json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert (written["format"], written["format_version"]) == ("dflash-verify-report", 1)
    assert (written["ok"], written["verdict"]) == (True, "equal")
    manifest = (pair.bundle.root / "manifest.json").read_bytes()
    assert written["bundle"]["manifest_sha256"] == hashlib.sha256(manifest).hexdigest()
    assert str(pair.bundle.root.parent) not in json.dumps(written), "a bundle may be published"
    assert written["environment"]["torch"] == torch.__version__
    assert written["logit_errors"]["4"]["median_row"] == report.logit_errors[4].median_row
    assert [path.name for path in (pair.bundle.root / "reports").iterdir()] == ["verify.json"]
    Bundle.open(pair.bundle.root, verify_files=True)


def test_table(report: VerifyReport) -> None:
    text = render(report)
    for fragment in (
        "width 4",
        "9 token ids",
        "0 bugs",
        "verdict: equal",
        "layer 2",
        "reference loop (dflash",
    ):
        assert fragment in text
    assert max(map(len, text.splitlines())) <= 120


def test_built_in_prompts_of_a_bundle_without_tokenizer(pair: Pair) -> None:
    found = pair.verify(prompts=None, max_new_tokens=2, reference=False, write_report=False)
    lengths = [len(prompt.prompt_token_ids) for prompt in found.prompts]
    assert lengths == [1, 2, 4, 5, 7, 11, 16, 33, 64]
    assert found.ok


def test_built_in_prompts_of_a_bundle_with_chat_template(talking: Pair) -> None:
    found = talking.verify(prompts=None, max_new_tokens=2, reference=False, write_report=False)
    assert found.ok
    assert "Why is the sky blue?" in [prompt.text for prompt in found.prompts]
    assert max(len(prompt.prompt_token_ids) for prompt in found.prompts) > 150, "longer than a prefill chunk"
    chat, text = (next(p for p in found.prompts if p.text.startswith(t)) for t in ("Hi", "def "))
    assert chat.prompt_token_ids == (6, 7, 5)  # user : Hi
    assert text.prompt_token_ids[0] == 10  # def, without a template around it


def test_16_bit_bundle(tmp_path: Path, pair: Pair) -> None:
    half = export(tmp_path, pair.target, pair.drafter, precision="fp16")
    found = half.verify()
    assert found.ok, found
    assert found.pytorch_16_bit is not None
    # The yardstick stays fp32, and the allowance is what fp16 costs PyTorch itself.
    assert found.pytorch_repeated.max_abs < 1e-4 < found.pytorch_16_bit.max_abs
    sixteen_bit = found.pytorch_16_bit
    assert found.limits.median_row == 4 * sixteen_bit.relative(sixteen_bit.median_row)
    assert "PyTorch in fp16" in render(found)


# --- Broken bundles ---


def scale_all(values: np.ndarray) -> None:
    values *= 1.1


def scale_one_in_a_thousand(values: np.ndarray) -> None:
    values[::1000] *= 1.2


@pytest.mark.parametrize(
    "change",
    [
        change_floats("target.data", scale_all),
        change_floats("target.data", scale_one_in_a_thousand),
        change_floats("embedding.data", scale_one_in_a_thousand),
        change_floats("lm_head.data", scale_one_in_a_thousand),
        change_rope,
    ],
    ids=["much", "little", "embedding", "head", "rope"],
)
def test_wrong_numbers_are_a_bug(tmp_path: Path, pair: Pair, change: Callable[[Path], None]) -> None:
    found = pair.verify(altered(pair.bundle, tmp_path / "broken", change), reference=False)
    assert (found.ok, found.verdict) == (False, "bug")
    assert len([text for text in found.problems if "rows" in text or "row passes" in text]) == 3, found
    # Its own error must not widen what counts as a near tie.
    assert found.limits.near_tie < 1e-4
    written = json.loads((tmp_path / "broken" / "reports" / "verify.json").read_text())
    assert (written["ok"], written["problems"]) == (False, list(found.problems))


def change_fused_rope(folder: Path) -> None:
    """The same positions as one row further on, in the fused target only."""
    model = onnx.load(folder / "target.fused.onnx", load_external_data=False)
    for table in model.graph.initializer:
        if table.name.startswith("rotary."):
            numbers = numpy_helper.to_array(table)
            table.CopyFrom(numpy_helper.from_array(numbers[[0, *range(len(numbers) - 1)]], table.name))
    onnx.save(model, folder / "target.fused.onnx")


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder, spec = tmp_path_factory.mktemp("fused"), TargetSpec("smollm2", head_dim=16)
    make_target(folder / "target", spec, seed=3)
    make_drafter(folder / "drafter", drafter_config(spec))
    return export(folder, folder / "target", folder / "drafter")


def test_both_forms_of_a_fused_target_are_measured(fused: Pair) -> None:
    found = fused.verify(reference=False)
    assert found.ok, found
    rows = sum(len(prompt.runs[0].token_ids) for prompt in found.prompts)
    assert {stats.rows for stats in found.logit_errors.values()} == {2 * rows}


@pytest.mark.parametrize("change", [change_fused_rope, change_rope], ids=["fused", "plain"])
def test_one_wrong_form_is_a_bug(tmp_path: Path, fused: Pair, change: Callable[[Path], None]) -> None:
    found = fused.verify(altered(fused.bundle, tmp_path / "broken", change), reference=False)
    assert (found.ok, found.verdict) == (False, "bug")
    assert found.limits.near_tie < 1e-4


def test_wrong_choice_with_right_logits_is_a_bug(tmp_path: Path, pair: Pair) -> None:
    found = pair.verify(altered(pair.bundle, tmp_path / "broken", change_choice), reference=False)
    assert found.verdict == "bug"
    assert all(found.limits.allow(stats) for stats in found.logit_errors.values())
    for prompt in found.prompts:
        runs = {run.name: run for run in prompt.runs}
        # Every token is accounted for, not only the first one that differs.
        assert runs["plain"].faults == tuple(range(len(runs["plain"].token_ids)))
        assert runs["PyTorch"].faults == ()
        assert runs["plain"].worst_own_logit_gap == pytest.approx(runs["plain"].worst_logit_gap, abs=1e-4)
    first = found.prompts[0].differences[0]
    assert (first.between[1], first.token, first.position, first.verdict) == ("PyTorch", 0, 1, "bug")
    assert first.top_two[0].id == first.tokens[1].id
    assert first.margin == first.top_two[0].logit - first.top_two[1].logit
    assert first.logit_gap > found.limits.near_tie
    assert "bug: prompt 0, plain" in render(found)
    assert "verdict: BUG" in render(found)


def test_wrong_drafts_change_no_token(tmp_path: Path) -> None:
    """A pair that always says token 7, and whose drafter knows; then a drafter that always says token 0."""
    model = make_target(tmp_path / "target", SPEC, spread=0.02)
    with torch.no_grad():
        common = torch.from_numpy(np.random.default_rng(0).standard_normal(SPEC.hidden)).float()
        model.model.embed_tokens.weight += common
        model.model.norm.weight.fill_(1)
        model.lm_head.weight[7] = common
    model.save_pretrained(tmp_path / "target")
    make_drafter(tmp_path / "drafter", drafter_config(SPEC), spread=0.02)
    pair = export(tmp_path, tmp_path / "target", tmp_path / "drafter")
    right = pair.verify()
    assert (right.verdict, right.warnings) == ("equal", ())
    assert right.drafting[0].tokens_per_step == pytest.approx(45 / 12)  # 15 in 4 steps: 4, 4, 4 and 3

    def forget(values: np.ndarray) -> None:
        values[:] = 0

    wrong = pair.verify(altered(pair.bundle, tmp_path / "wrong", change_floats("drafter.data", forget)))
    assert (wrong.verdict, wrong.problems) == ("equal", ())
    assert [run.token_ids for run in wrong.prompts[0].runs] == [
        run.token_ids for run in right.prompts[0].runs
    ]
    assert wrong.drafting[0].tokens_per_step == 1.0
    assert wrong.reference.tokens_per_step == right.reference.tokens_per_step
    assert "doesn't draft as the reference does" in wrong.warnings[0]
    assert "warning: the drafter" in render(wrong)


def test_wrong_features_are_named(tmp_path: Path, pair: Pair) -> None:
    """Taps of other layers than the manifest says: right tokens, poor drafts."""

    def move(manifest: dict[str, Any]) -> None:
        manifest["drafter"]["feature_layers"] = [1, 2]

    found = pair.verify(altered(pair.bundle, tmp_path / "moved", change_manifest(move)), reference=False)
    assert found.verdict == "equal"
    assert len(found.warnings) == 1
    assert found.warnings[0].startswith("features of layer 1 are off")


def test_near_ties_are_told_from_bugs(tmp_path: Path) -> None:
    """Two rows of the head are equal but for their last bits; the bundle has them the other way round."""
    model = make_target(tmp_path / "target", SPEC, seed=5)
    generator = np.random.default_rng(0)
    with torch.no_grad():
        row = 4 * model.lm_head.weight[8]
        noise = torch.from_numpy(generator.choice([-4e-7, 4e-7], SPEC.hidden)).float()
        model.lm_head.weight[8], model.lm_head.weight[9] = row, row + noise
    model.save_pretrained(tmp_path / "target")
    make_drafter(tmp_path / "drafter", drafter_config(SPEC))
    pair = export(tmp_path, tmp_path / "target", tmp_path / "drafter")

    def swap(values: np.ndarray) -> None:
        rows = values.reshape(-1)[: SPEC.vocab * SPEC.hidden].reshape(SPEC.vocab, SPEC.hidden)
        rows[[8, 9]] = rows[[9, 8]]

    swapped = altered(pair.bundle, tmp_path / "swapped", change_floats("lm_head.data", swap))
    found = pair.verify(swapped)
    assert (found.ok, found.verdict, found.problems) == (True, "near tie", ())
    differences = [item for prompt in found.prompts for item in prompt.differences]
    assert differences
    for item in differences:
        assert {token.id for token in item.tokens} == {token.id for token in item.top_two} == {8, 9}
        assert 0 <= item.logit_gap <= found.limits.near_tie < 1e-4
        assert item.verdict == "near tie"
    assert sum(run.near_ties for prompt in found.prompts for run in prompt.runs) > 0
    assert sum(prompt.close_calls for prompt in found.prompts) > 0
    assert "verdict: near ties" in render(found)
    assert command(swapped, pair, tmp_path).exit_code == 0


# --- What can't be compared ---


def test_damaged_file_is_found_first(tmp_path: Path, pair: Pair) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(pair.bundle.root, damaged)
    change_floats("target.data", scale_all)(damaged)
    with pytest.raises(IntegrityError, match=r"target\.data"):
        pair.verify(damaged)


def test_weights_of_another_seed(tmp_path: Path, pair: Pair) -> None:
    make_target(tmp_path / "other", SPEC, seed=4)
    with pytest.raises(VerifyError, match="isn't the target that the bundle was built from") as caught:
        pair.verify(target=tmp_path / "other")
    assert "model.safetensors: sha256" in str(caught.value)
    assert "generation_config.json" in str(caught.value)
    make_drafter(tmp_path / "drafter", drafter_config(SPEC), seed=9)
    with pytest.raises(VerifyError, match="isn't the drafter that the bundle was built from"):
        pair.verify(drafter=tmp_path / "drafter")


def test_another_name_and_more_files_do_no_harm(tmp_path: Path, pair: Pair) -> None:
    shutil.copytree(pair.target, tmp_path / "renamed")
    (tmp_path / "renamed" / "README.md").write_text("hello")
    assert pair.verify(target=tmp_path / "renamed", prompts=[[1]], max_new_tokens=1, reference=False).ok


def test_local_target_has_to_be_named(pair: Pair) -> None:
    with pytest.raises(VerifyError, match="doesn't record where its target lies") as caught:
        verify(pair.bundle)
    assert "--target" in str(caught.value)


def test_drafter_that_is_not_named_skips_the_reference(pair: Pair) -> None:
    found = pair.verify(drafter=None, prompts=[[1]], max_new_tokens=2, write_report=False)
    assert found.ok
    assert "name it with --drafter" in str(found.reference.skipped)
    assert "reference loop: skipped" in render(found)
    assert pair.verify(
        drafter=None, prompts=[[1]], max_new_tokens=1, reference=False, write_report=False
    ).reference.skipped == ("not asked for")


def test_recorded_hub_ids_are_looked_up(tmp_path: Path, pair: Pair) -> None:
    """There is no network here: the target is needed, the drafter is not."""

    def to_hub(role: str) -> Callable[[Path], None]:
        return change_manifest(
            lambda manifest: manifest[role]["source"].update(kind="hub", id="no/model", revision="0" * 40)
        )

    with pytest.raises(SourceError, match="no/model at revision 0000"):
        pair.verify(altered(pair.bundle, tmp_path / "a", to_hub("target")), target=None)
    found = pair.verify(
        altered(pair.bundle, tmp_path / "b", to_hub("drafter")), drafter=None, prompts=[[1]], max_new_tokens=1
    )
    assert "the drafter can't be fetched" in str(found.reference.skipped)


def test_reference_is_skipped_where_it_is_not_installed(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dflash_export.reference.importlib.util.find_spec", lambda name: None)
    found = pair.verify(drafter=None, prompts=[[1]], max_new_tokens=1, write_report=False)
    assert found.reference.skipped == "PyPI dflash is not installed"


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"prompts": []}, VerifyError, "no prompts"),
        ({"prompts": "Why?"}, VerifyError, "no prompts"),
        ({"prompts": 7}, VerifyError, "no prompts"),
        ({"prompts": [[1], []]}, PromptError, "the prompt is empty"),
        ({"prompts": [[12]]}, PromptError, "12"),
        ({"prompts": ["Why?"]}, PromptError, "no tokenizer"),
        ({"max_new_tokens": 0}, RequestError, "max_new_tokens"),
        ({"max_new_tokens": 90}, ContextLengthError, "max_seq_len 96"),
        ({"prompts": None, "max_new_tokens": 96}, VerifyError, "no built-in prompt fits"),
        ({"target": "missing.gguf"}, SourceError, "doesn't exist"),
    ],
)
def test_wrong_arguments(pair: Pair, options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        pair.verify(**options)


def test_report_that_cannot_be_written_fails_before_the_work(tmp_path: Path, pair: Pair) -> None:
    in_the_way = altered(
        pair.bundle, tmp_path / "a", lambda folder: (folder / "reports").write_text("") and None
    )
    with pytest.raises(OutputError, match="can't write a report"):
        pair.verify(in_the_way, prompts=[])
    (tmp_path / "outside").mkdir()
    linked = altered(
        pair.bundle, tmp_path / "b", lambda folder: (folder / "reports").symlink_to(tmp_path / "outside")
    )
    with pytest.raises(OutputError, match="is a link"):
        pair.verify(linked, prompts=[])
    assert list((tmp_path / "outside").iterdir()) == []
    assert pair.verify(in_the_way, prompts=[[1]], max_new_tokens=1, reference=False, write_report=False).ok


# --- The command ---


def command(bundle: Path, pair: Pair, folder: Path, *more: str) -> Any:
    prompts = folder / "prompts.txt"
    prompts.write_text("Why is the sky\nHi\n")
    arguments = [
        "verify",
        str(bundle),
        "--target",
        str(pair.target),
        "--threads",
        "1",
        "--max-new-tokens",
        "6",
    ]
    return CliRunner().invoke(main, [*arguments, *more])


def test_command_exits_with_0_for_a_right_bundle(tmp_path: Path, talking: Pair) -> None:
    result = command(
        talking.bundle.root, talking, tmp_path, "--prompts", str(tmp_path / "prompts.txt"), "--chat"
    )
    assert result.exit_code == 0, result.output
    assert "verdict: equal" in result.stdout
    assert "comparing with PyTorch" in result.stderr
    more = ["--prompts", str(tmp_path / "prompts.txt"), "--limit", "1", "--json", "--no-report"]
    result = command(talking.bundle.root, talking, tmp_path, *more, "--drafter", str(talking.drafter))
    assert result.exit_code == 0, result.output
    (line,) = result.stdout.splitlines()
    found = json.loads(line)
    assert (found["ok"], [prompt["text"] for prompt in found["prompts"]]) == (True, ["Why is the sky"])
    assert found["reference"]["skipped"] is None


def test_command_exits_with_1_for_a_broken_bundle(tmp_path: Path, talking: Pair) -> None:
    broken = altered(talking.bundle, tmp_path / "broken", change_floats("target.data", scale_all))
    result = command(broken, talking, tmp_path, "--prompts", str(tmp_path / "prompts.txt"))
    assert result.exit_code == 1
    assert "verdict: BUG" in result.stdout
    assert "doesn't compute what PyTorch computes" in result.stderr


def test_command_takes_the_checkpoints_from_a_recipe(tmp_path: Path, talking: Pair) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"target: {talking.target}\ndrafter: {talking.drafter}\n")
    (tmp_path / "prompts.txt").write_text("Hi\n")
    arguments = ["verify", talking.bundle.root, "--recipe", recipe, "--prompts", tmp_path / "prompts.txt"]
    result = CliRunner().invoke(main, [*map(str, arguments), "--max-new-tokens", "4", "--no-report"])
    assert result.exit_code == 0, result.output
    assert "reference loop (dflash" in result.stdout
