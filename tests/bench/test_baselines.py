"""What the benchmark compares with: each decodes a tiny pair for real, and says clearly why it can't."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from click.testing import CliRunner

from dflash_bench.cli import main
from dflash_bench.run.measure import run_bench
from dflash_bench.systems.base import BenchSetup, System
from dflash_bench.systems.genai import make_genai, make_genai_int4, run_builder
from dflash_bench.systems.pytorch import make_hf, make_reference
from dflash_bench.systems.registry import FACTORIES as REGISTRY
from dflash_export import build
from dflash_export.errors import VerifyError
from dflash_rt import Bundle
from dflash_rt.errors import BackendUnavailableError, OutputError
from tests.checkpoints import drafter_json, save_drafter, save_target

ROOT = Path(__file__).parents[2]
FACTORIES = {"hf": make_hf, "reference": make_reference, "genai": make_genai}
INT4 = {"genai-int4": make_genai_int4}
PROMPTS = [[5, 9, 200, 41], [17], list(range(30, 60))]


class Pair:
    """A tiny random pair, its bundle, and one folder for what is converted."""

    def __init__(self, folder: Path) -> None:
        # Weights far from zero: logits of the default ones are so close that answers are all ties. genai's
        # attention takes head sizes that are multiples of 16 only.
        self.target = save_target(folder / "target", "qwen3", initializer_range=0.5, head_dim=16)
        self.drafter = save_drafter(folder / "drafter", drafter_json(initializer_range=0.5))
        self.bundle = build(self.target, self.drafter, folder / "bundle", num_draft_tokens=2)
        self.cache = folder / "cache"
        self.lines: list[str] = []
        make_genai(self.setup(say=self.lines.append))

    def setup(self, **changes: Any) -> BenchSetup:
        values: dict[str, Any] = {
            "bundle": self.bundle,
            "threads": 1,
            "num_draft_tokens": (1, 3),
            "target": str(self.target),
            "drafter": str(self.drafter),
            "cache_folder": self.cache,
        }
        return BenchSetup(**(values | changes))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp("pair"))


def test_the_registry_names_the_factories() -> None:
    assert REGISTRY == FACTORIES | INT4


# --- Decoding ---


def test_everyone_gives_the_same_tokens(pair: Pair) -> None:
    threads = torch.get_num_threads()
    report = run_bench(
        pair.bundle,
        prompts=PROMPTS,
        compare=("hf", "reference", "genai"),
        max_new_tokens=20,
        repeats=1,
        num_draft_tokens=(3, 1),
        threads=1,
        target=str(pair.target),
        drafter=str(pair.drafter),
        cache_folder=pair.cache,
    )
    assert list(report.outcomes) == [
        "plain", "drafted-3", "drafted-1", "hf", "reference-3", "reference-1", "genai"
    ]  # fmt: skip
    assert {name for name, same in report.agreements.items() if not same.exact} == set()
    assert report.skipped == {}
    assert report.num_draft_tokens == {"drafted-3": 3, "drafted-1": 1, "reference-3": 3, "reference-1": 1}
    for outcomes in report.outcomes.values():
        for outcome in outcomes.values():
            assert outcome.prefill_seconds > 0
            assert outcome.decode_seconds > 0
    for name in ("plain", "hf", "genai"):
        assert report.summaries[name].steps == report.summaries[name].decoded_tokens
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("others", [(), (298, 299), (0,)])
@pytest.mark.parametrize("name", FACTORIES)
def test_stop_tokens_are_the_bundles(name: str, others: tuple[int, ...], pair: Pair) -> None:
    """One that comes in the answer, alone and among others."""
    free = decode(make_hf, pair.setup(bundle=with_stops(pair.bundle, ())))
    assert len(free) == 20
    assert not set(others) & set(free[:5])
    stop = next(token for place, token in enumerate(free) if place > 2 and token not in free[:place])
    bundle = with_stops(pair.bundle, (stop, *others))
    assert decode(FACTORIES[name], pair.setup(bundle=bundle)) == free[: free.index(stop) + 1]
    assert decode(FACTORIES[name], pair.setup(bundle=with_stops(pair.bundle, ()))) == free


def test_genais_own_stop_tokens_do_not_count(pair: Pair, tmp_path: Path) -> None:
    cache = shutil.copytree(pair.cache, tmp_path / "cache")
    bundle = with_stops(pair.bundle, (298, 299))
    answer = decode(make_hf, pair.setup(bundle=bundle))
    assert not {298, 299} & set(answer)
    (path,) = cache.glob("*/genai_config.json")
    config = json.loads(path.read_text())
    config["model"]["eos_token_id"] = answer[4]
    path.write_text(json.dumps(config))
    assert decode(make_genai, pair.setup(bundle=bundle, cache_folder=cache)) == answer


def test_the_reference_drafts_as_wide_as_asked(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    from dflash_export import reference as torch_reference

    seen: list[int] = []
    real = torch_reference.generate_reference

    def spy(*arguments: Any, block_size: int, **options: Any) -> Any:
        seen.append(block_size)
        return real(*arguments, block_size=block_size, **options)

    monkeypatch.setattr(torch_reference, "generate_reference", spy)
    decode(make_reference, pair.setup(num_draft_tokens=(2, 1, 3)))
    assert seen == [3, 2, 4]


def decode(factory: Callable[[BenchSetup], Any], setup: BenchSetup) -> tuple[int, ...]:
    systems: list[System] = list(factory(setup))
    answers = {system.decode(PROMPTS[0], 20).token_ids for system in systems}
    for system in systems:
        system.close()
        system.close()
    (answer,) = answers
    return answer


def with_stops(bundle: Bundle, stops: tuple[int, ...]) -> Bundle:
    from dataclasses import replace

    generation = replace(bundle.manifest.generation, stop_token_ids=stops)
    return replace(bundle, manifest=replace(bundle.manifest, generation=generation))


def test_models_are_loaded_and_converted_once(pair: Pair) -> None:
    setup = pair.setup(say=pair.lines.append)
    make_genai(setup)
    assert pair.lines == ["converting the target with onnxruntime-genai's builder"]
    (folder,) = pair.cache.iterdir()
    assert folder.name.startswith("genai-")
    assert setup.shared == {}  # a converted target needs no PyTorch
    make_hf(setup)
    make_reference(setup)
    assert list(setup.shared) == ["torch target"]


def test_genais_int4_is_another_model(pair: Pair, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    setup = pair.setup(cache_folder=cache)
    (system,) = make_genai_int4(setup)
    assert system.name == "genai-int4"
    assert len(system.decode(PROMPTS[0], 5).token_ids) == 5
    system.close()
    (folder,) = cache.iterdir()
    assert folder.name.startswith("genai-int4-")
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    products = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert products
    found = [{a.name: a.i for a in node.attribute} for node in products]
    assert {(a["bits"], a["block_size"], a["accuracy_level"]) for a in found} == {(4, 32, 4)}


def test_a_recipe_names_the_checkpoints(pair: Pair, tmp_path: Path) -> None:
    recipe = tmp_path / "pair.yaml"
    recipe.write_text(f"target: {pair.target}\ndrafter: {pair.drafter}\n")
    by_recipe = pair.setup(target=None, drafter=None, recipe=recipe)
    assert decode(make_reference, by_recipe) == decode(make_hf, pair.setup())
    recipe.write_text("target: ./missing\ndrafter: ./missing\n")
    assert len(decode(make_reference, pair.setup(recipe=recipe))) == 20  # options win over the recipe


def test_command(pair: Pair, tmp_path: Path) -> None:
    """The command prints a table and, last, one line of JSON; the rest goes to stderr."""
    plot = tmp_path / "plot.png"
    arguments = ["--compare", "hf", "--target", pair.target, "--max-new-tokens", 6, "--repeats", 1]
    arguments += ["--threads", 1, "--plot", plot]
    result = CliRunner().invoke(main, ["run", str(pair.bundle.root), *map(str, arguments)])
    assert result.exit_code == 0, result.output
    table, _, line = result.stdout.strip().rpartition("\n")
    found = json.loads(line)
    assert list(found["systems"]) == ["plain", "drafted-2", "hf"]
    assert found["threads"] == 1
    assert "tokens/s of" in table
    assert "loading hf" in result.stderr
    assert plot.read_bytes().startswith(b"\x89PNG")


# --- What can't be ---


@pytest.mark.parametrize("name", FACTORIES)
def test_only_fp32_bundles_are_compared(name: str, pair: Pair) -> None:
    from dataclasses import replace

    bundle = replace(pair.bundle, manifest=replace(pair.bundle.manifest, precision="bf16"))
    with pytest.raises(BackendUnavailableError, match=f"leave {name} out of --compare"):
        FACTORIES[name](pair.setup(bundle=bundle))


@pytest.mark.parametrize(
    ("name", "gone", "remedy"),
    [
        ("hf", "torch", "pip install 'dflash-export[export]'"),
        ("reference", "torch", "pip install 'dflash-export[export]'"),
        ("reference", "dflash", "pip install --no-deps dflash==0.1.0"),
        ("genai", "onnxruntime_genai", "pip install --no-deps onnxruntime-genai==0.18.0"),
    ],
)
def test_missing_packages(
    name: str, gone: str, remedy: str, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "dflash_export.reference", raising=False)
    monkeypatch.setitem(sys.modules, gone, None)
    with pytest.raises(BackendUnavailableError, match=f"{name} can't be compared with") as caught:
        FACTORIES[name](pair.setup())
    assert remedy in str(caught.value)


def test_the_wrong_target_is_refused(pair: Pair, tmp_path: Path) -> None:
    other = save_target(tmp_path / "other", "qwen3", initializer_range=0.3, head_dim=16)
    with pytest.raises(VerifyError, match="isn't the target that the bundle was built from"):
        make_hf(pair.setup(target=str(other)))
    with pytest.raises(VerifyError, match="--target"):
        make_hf(pair.setup(target=None))


def test_a_cache_that_cannot_be_written(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="--cache-folder"):
        make_genai(pair.setup(cache_folder=tmp_path / "file"))


def test_a_target_that_genai_cannot_run(pair: Pair, tmp_path: Path) -> None:
    shutil.copytree(pair.cache, tmp_path / "cache")
    (model,) = tmp_path.glob("cache/*/model.onnx")
    model.write_bytes(b"not a graph")
    with pytest.raises(BackendUnavailableError, match="can't run the target") as caught:
        make_genai(pair.setup(cache_folder=tmp_path / "cache"))
    assert "leave genai out of --compare" in str(caught.value)


def test_a_target_that_genai_cannot_convert(pair: Pair, tmp_path: Path) -> None:
    config = json.loads((pair.target / "config.json").read_text())
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text(json.dumps(config | {"model_type": "unheard-of"}))
    with pytest.raises(BackendUnavailableError, match="can't convert the target") as caught:
        run_builder(checkpoint, tmp_path / "output")
    assert "leave genai out of --compare" in str(caught.value)
