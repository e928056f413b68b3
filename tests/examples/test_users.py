"""The example of each kind of user runs: a service, an edge device, a researcher."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

from dflash_export import build
from dflash_rt import Bundle, Generator
from tests.checkpoints import byte_tokenizer
from tests.pairs import TargetSpec, drafter_config, make_drafter, make_target

EXAMPLES = Path(__file__).parents[2] / "examples"
# 16 is the smallest head size with a fused kernel.
SPEC = TargetSpec("qwen3", hidden=64, heads=4, kv_heads=2, head_dim=16, layers=2, vocab=300)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pair")
    make_target(root / "target", SPEC)
    byte_tokenizer().save(str(root / "target" / "tokenizer.json"))
    make_drafter(root / "drafter", drafter_config(SPEC, head_dim=16))
    return root


@pytest.fixture(scope="module")
def bundle(pair: Path) -> Bundle:
    return build(pair / "target", pair / "drafter", pair / "bundle", max_seq_len=96, prefill_chunk=16)


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def service(bundle: Bundle) -> Iterator[str]:
    with Generator(bundle) as generator, load("service").Server(generator, port=0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()
        thread.join()


def post(url: str, prompt: str) -> str:
    with urllib.request.urlopen(url, data=prompt.encode(), timeout=120) as answer:
        text: bytes = answer.read()
    return text.decode("utf-8")


def test_a_service_answers_threads(bundle: Bundle, service: str) -> None:
    prompts = ["one", "two", "three"]
    with Generator(bundle) as generator, ThreadPoolExecutor(3) as pool:
        wanted = [generator.generate(p, max_new_tokens=64, stop=["\n\n"]).text for p in prompts]
        assert list(pool.map(lambda prompt: post(service, prompt), prompts)) == wanted
    assert all(wanted)


def test_a_service_refuses_a_prompt_that_is_too_long(service: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(service, "x" * 200)
    with caught.value as answer:
        assert answer.code == 400
    assert post(service, "one"), "the next request is answered"


def test_an_edge_device_compiles_and_answers(bundle: Bundle, tmp_path: Path) -> None:
    """Here without a GPU, so that the CPU answers: the engines are built, and built once."""
    pytest.importorskip("tensorrt_rtx", reason="pip install 'dflash-export[tensorrt-rtx]'")
    shutil.copytree(bundle.root, tmp_path / "bundle")
    options = ["--backend", "tensorrt-rtx", "--device", "rtx-4090", "--max-new-tokens", "8"]
    command = [sys.executable, EXAMPLES / "edge_device.py", tmp_path / "bundle", "one", *options]
    first = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert first.returncode == 0, first.stderr
    assert f"built {len(bundle.manifest.graphs)} engines, reused 0" in first.stderr
    with Generator(bundle) as generator:
        assert first.stdout == generator.generate("one", max_new_tokens=8).text + "\n"
    again = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert f"built 0 engines, reused {len(bundle.manifest.graphs)}" in again.stderr
    assert again.stdout == first.stdout


def test_a_researcher_proves_and_measures(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    sources = bundle.root.parent
    assert load("researcher").study(
        str(sources / "target"), str(sources / "drafter"), bundle.root, max_new_tokens=8
    )
    told = capsys.readouterr().out
    assert "verdict" in told
    assert "tokens/s" in told
