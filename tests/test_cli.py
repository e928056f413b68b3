"""Both commands as a user meets them: help, wrong usage, errors, interruption, output streams."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from dflash_bench.cli import main as bench_main
from dflash_export.cli import main as export_main
from dflash_rt import Bundle
from dflash_rt.bundle.engine_sets import EngineFile
from dflash_rt.cli.console import CommandGroup
from dflash_rt.cli.main import main as rt_main
from tests.rt.bundle.test_engine_sets import TRT, engine_set, store
from tests.rt.bundle_maker import manifest_document, write_bundle

ROOT = Path(__file__).parents[1]

COMMANDS = {"dflash-bench": bench_main, "dflash-export": export_main, "dflash-rt": rt_main}
MODULES = {
    "dflash-bench": "dflash_bench.cli",
    "dflash-export": "dflash_export.cli",
    "dflash-rt": "dflash_rt.cli.main",
}
HEAVY = {"jinja2", "numpy", "onnx", "onnxruntime", "rich", "tokenizers", "torch", "transformers", "yaml"}
HELP = [(program, "") for program in COMMANDS] + [
    (program, name) for program, group in COMMANDS.items() for name in group.commands
]


def invoke(program: str, *arguments: str | Path, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(COMMANDS[program], [str(argument) for argument in arguments], input=stdin)


def command_line(program: str, *arguments: str | Path, before: str = "") -> list[str]:
    script = f"{before}\nfrom {MODULES[program]} import main\nmain(prog_name={program!r})"
    return [sys.executable, "-W", "error", "-c", script, *map(str, arguments)]


def run(
    program: str, *arguments: str | Path, before: str = "", **options: Any
) -> subprocess.CompletedProcess[str]:
    command = command_line(program, *arguments, before=before)
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


# --- Help ---


@pytest.mark.parametrize(("program", "command"), HELP)
def test_help_lists_every_option_and_loads_nothing_heavy(program: str, command: str) -> None:
    report = "import atexit, sys\natexit.register(lambda: print(*sys.modules, file=sys.stderr))"
    result = run(program, *command.split(), "--help", before=report)
    assert result.returncode == 0
    group = COMMANDS[program]
    parameters = (group.commands[command] if command else group).params
    options = [name for parameter in parameters for name in parameter.opts if name.startswith("-")]
    assert [name for name in options if name not in result.stdout] == []
    assert "BUNDLE" in result.stdout or command in ("", "build", "gpu")
    assert HEAVY & set(result.stderr.split()) == set()


def test_commands_of_the_issue_exist() -> None:
    assert set(export_main.commands) == {"build", "compile", "inspect", "verify"}
    assert set(rt_main.commands) == {"generate"}
    assert set(bench_main.commands) == {"run", "widths", "gpu"}


@pytest.mark.parametrize("program", COMMANDS)
def test_version(program: str) -> None:
    assert invoke(program, "--version").output == f"{program}, version 0.1.0\n"


def test_backends_come_from_the_registry() -> None:
    from dflash_rt.backends import BACKEND_NAMES

    options = {option.name: option for option in rt_main.commands["generate"].params}
    assert isinstance(options["backend"].type, click.Choice)
    assert tuple(options["backend"].type.choices) == BACKEND_NAMES


# --- Wrong usage: exit 2 ---


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("dflash-rt translate", "No such command"),
        ("dflash-rt generate", "Missing argument 'BUNDLE'"),
        ("dflash-rt generate b --promt x", "No such option"),
        ("dflash-rt generate b --prompt x --prompt-file y", "exclude each other"),
        ("dflash-rt generate b --prompt x --system y", "give --chat"),
        ("dflash-rt generate b --prompt x --chat-template-kwarg a=1", "give --chat"),
        ("dflash-rt generate b --prompt x --no-draft --num-draft-tokens 3", "exclude each other"),
        ("dflash-rt generate b --prompt x --num-draft-tokens -1", "not in the range"),
        ("dflash-rt generate b --prompt x --num-draft-tokens many", "not a valid integer"),
        ("dflash-rt generate b --prompt x --threads 0", "not in the range"),
        ("dflash-rt generate b --prompt x --max-new-tokens 0", "not in the range"),
        ("dflash-rt generate b --prompt x --max-new-tokens many", "not a valid integer"),
        ("dflash-rt generate b --prompt x --temperature warm", "not a valid float"),
        ("dflash-rt generate b --prompt x --backend abacus", "'onnxruntime'"),
        ("dflash-rt generate b --prompt x --chat --chat-template-kwarg thinking", "is not KEY=JSON"),
        ("dflash-rt generate b --prompt x --chat --chat-template-kwarg a=yes", "text needs its own quotes"),
        ("dflash-rt generate b --prompt x --chat --chat-template-kwarg a=[1]", "is not text"),
        ("dflash-rt generate b --prompt x --chat --chat-template-kwarg a=NaN", "is not text"),
        ("dflash-bench run b --compare hf,vllm", "nothing of that name to compare with"),
        ("dflash-bench run b --compare ,", "nothing of that name"),
        ("dflash-bench run b --limit 3", "give --prompts"),
        ("dflash-bench widths b --chat", "give --prompts"),
        ("dflash-bench widths b --compare hf", "No such option"),
        ("dflash-export build", "--target and --drafter and --output must be given, or --recipe"),
        ("dflash-export build --target a/b --drafter c/d", "--output must be given"),
        ("dflash-export build --recipe engines/x", "--output must be given"),
        ("dflash-export build --recipe r.yaml --precision int4", "'fp32', 'fp16', 'bf16'"),
        ("dflash-export inspect", "Missing argument 'BUNDLE'"),
        ("dflash-export verify b --chat", "give --prompts"),
    ],
)
def test_wrong_usage(line: str, part: str) -> None:
    result = invoke(*line.split())
    assert result.exit_code == 2
    assert part in result.stderr
    assert result.stdout == ""


# --- The project's errors: exit 1, a message, no traceback ---


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("dflash-rt generate missing --prompt x", "no bundle at missing"),
        ("dflash-rt generate missing --prompt x --temperature -1", "temperature is wrong"),
        ("dflash-rt generate missing --prompt x --seed -1", "seed is wrong"),
        ("dflash-rt generate missing --prompt x --logprobs 21", "logprobs is wrong"),
        ("dflash-rt generate missing --prompt-file nothing.txt", "nothing.txt can't be read"),
        ("dflash-export inspect missing", "no bundle at missing"),
        ("dflash-export verify missing --recipe missing.yaml", "missing.yaml can't be read"),
        ("dflash-export verify missing", "no bundle at missing"),
        ("dflash-bench run missing", "no bundle at missing"),
        ("dflash-bench widths missing --prompts missing.txt", "missing.txt can't be read"),
        ("dflash-export build --recipe missing.yaml", "missing.yaml can't be read"),
        ("dflash-export build --target package:x --drafter c/d -o o", "spelled wrongly"),
        ("dflash-export build --target ./no-model --drafter ./no-drafter -o o", "no-model"),
    ],
)
def test_project_errors(tmp_path: Path, line: str, part: str) -> None:
    program, *arguments = line.split()
    result = run(program, *arguments, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert result.returncode == 1, result.stderr
    assert result.stdout == ""
    assert part in result.stderr
    assert "Error: " in result.stderr
    assert "what to do:" in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_missing_extra_names_the_extra(tmp_path: Path) -> None:
    blocker = "import sys\nsys.modules['torch'] = None"
    result = run(
        "dflash-export", *f"build --target a/b --drafter c/d -o {tmp_path}/o".split(), before=blocker
    )
    assert result.returncode == 1
    assert "the package torch is not installed" in result.stderr
    assert "pip install 'dflash-export[export]'" in result.stderr
    assert "Traceback" not in result.stderr


def test_compiling_asks_for_no_pytorch(tmp_path: Path) -> None:
    hidden = "import sys; sys.modules['onnx'] = None\n"
    arguments = ("compile", write_bundle(tmp_path), "--backend", "tensorrt-rtx")
    result = run("dflash-export", *arguments, before=hidden)
    assert result.returncode == 1
    assert "pip install 'dflash-export[compile]'" in result.stderr


def test_bugs_keep_their_traceback() -> None:
    @click.group(cls=CommandGroup)
    def program() -> None:
        pass

    @program.command()
    @click.argument("kind")
    def fail(kind: str) -> None:
        raise ModuleNotFoundError("no", name="dflash_rt.absent") if kind == "import" else ZeroDivisionError

    assert isinstance(CliRunner().invoke(program, ["fail", "import"]).exception, ModuleNotFoundError)
    assert isinstance(CliRunner().invoke(program, ["fail", "other"]).exception, ZeroDivisionError)


# --- Interruption and streams ---


@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
def test_interrupt() -> None:
    # Stdin is a pipe that stays open, so `generate` waits for its prompt; the hook tells when it does.
    before = (
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # it may be ignored in background jobs
        "class Stdin:\n"
        "    buffer = property(lambda self: self)\n"
        "    def isatty(self): return False\n"
        "    def read(self):\n"
        "        print('waiting', file=sys.stderr, flush=True)\n"
        "        return sys.__stdin__.buffer.read()\n"
        "sys.stdin = Stdin()"
    )
    command = command_line("dflash-rt", "generate", "bundle", before=before)
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "waiting\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err.strip()) == (130, "", "")


def test_broken_pipe_is_quiet(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path)
    reader, writer = os.pipe()
    os.close(reader)
    command = command_line("dflash-export", "inspect", "--no-verify", bundle)
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writer)
    assert (result.returncode, result.stderr) == (1, "")


def test_results_and_errors_are_utf8_whatever_the_system_says() -> None:
    """Windows writes a code page into a pipe."""
    script = (
        "import click; from dflash_rt.cli.console import CommandGroup, fail\n"
        "@click.group(cls=CommandGroup)\n"
        "def main(): pass\n"
        "@main.command()\n"
        "def say(): click.echo('日本'); fail('本日')\n"
        "main(['say'])\n"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, timeout=120)
    assert done.stdout.decode("utf-8").strip() == "日本"
    assert "本日" in done.stderr.decode("utf-8")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize(
    "line",
    [
        "dflash-rt --help",
        "dflash-rt --version",
        "dflash-rt generate --help",
        "dflash-export --help",
        "dflash-export inspect BUNDLE",
        "dflash-export inspect --json BUNDLE",
    ],
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_full_stdout_is_told(tmp_path: Path, line: str, unbuffered: str) -> None:
    program, *arguments = line.replace("BUNDLE", str(write_bundle(tmp_path))).split()
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            command_line(program, *arguments),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )
    assert result.returncode == 1
    told = result.stderr.replace("hashing files\n", "").splitlines()
    assert told[-1] == "Error: standard output can't be written: No space left on device"
    assert "Traceback" not in result.stderr
    assert "Exception ignored" not in result.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_full_stdout_of_generate_is_told(smollm2_bundle: Bundle) -> None:
    arguments = ("generate", smollm2_bundle.root, "--prompt", "The", "--max-new-tokens", "8")
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            command_line("dflash-rt", *arguments), stdout=full, stderr=subprocess.PIPE, text=True, timeout=120
        )
    assert result.returncode == 1
    assert result.stderr == "Error: standard output can't be written: No space left on device\n"


def test_another_full_file_keeps_its_traceback() -> None:
    @click.group(cls=CommandGroup)
    def program() -> None:
        pass

    @program.command()
    def fail() -> None:
        raise OSError(28, "No space left on device")

    assert isinstance(CliRunner().invoke(program, ["fail"]).exception, OSError)


# --- inspect ---


def test_inspect_shows_a_bundle(tmp_path: Path) -> None:
    result = invoke("dflash-export", "inspect", write_bundle(tmp_path))
    assert result.exit_code == 0
    for part in (
        "tiny, fp32",
        "someone/model (llama)",
        "3 layers of 16, vocabulary 32, tied",
        "2 layers, block of 4, window 16, on layers 0, 2",
        "64 tokens, prefill in chunks of 8",
        "text, chats",
        "num_draft_tokens 2, chat template with enable_thinking=false",
        "sampling     greedy\n",
        "in   embeddings float32 [batch, rows, 16]",
        "in place  6 caches float32 [batch, 2, capacity, 4]",
        "data/weights.bin",
        "hub someone/model at 0123abc, 1 files",
        "folder drafter, 1 files",
        "torch 2.13.0",
    ):
        assert part in result.stdout
    assert "key.0" not in result.stdout  # caches share one line
    assert result.stdout.count("  ok\n") == 8
    assert "hashing files" in result.stderr
    assert "hashing files" not in result.stdout


def test_inspect_shows_how_tokens_are_chosen(tmp_path: Path) -> None:
    document = manifest_document()
    document["generation"]["sampling"] |= {"temperature": 0.6, "top_k": 20, "repetition_penalty": 1.05}
    bundle = write_bundle(tmp_path, document)
    result = invoke("dflash-export", "inspect", "--no-verify", bundle)
    assert "  temperature 0.6, top_k 20, repetition_penalty 1.05\n" in result.stdout


def test_inspect_finds_a_changed_file(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path)
    file = bundle / "data" / "weights.bin"
    file.write_bytes(file.read_bytes().swapcase())
    (bundle / "notes.txt").touch()
    result = invoke("dflash-export", "inspect", bundle)
    assert result.exit_code == 1
    assert result.stdout.count("  changed\n") == 1
    assert "not part of the bundle" in result.stdout
    assert "data/weights.bin" in result.stderr
    assert "what to do:" in result.stderr
    unchecked = invoke("dflash-export", "inspect", "--no-verify", bundle)
    assert unchecked.exit_code == 0
    assert unchecked.stdout.count("  not checked\n") == 8


def test_inspect_finds_weights_outside_the_manifest(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path, locations={"target.onnx": "more.bin", "draft.onnx": "data/weights.bin"})
    (bundle / "more.bin").touch()
    result = invoke("dflash-export", "inspect", bundle)
    assert result.exit_code == 1
    assert "target.onnx: takes weights from 'more.bin', which manifest.json doesn't list" in result.stderr
    assert "draft.onnx" not in result.stderr
    assert "Traceback" not in result.stderr


def test_inspect_as_json(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path)
    result = invoke("dflash-export", "inspect", "--json", bundle)
    value = json.loads(result.stdout)
    assert result.stdout.count("\n") == 1
    assert value["manifest"] == json.loads((bundle / "manifest.json").read_text())
    assert set(value["files"].values()) == {"ok"}
    assert value["bytes"] == sum(record["size"] for record in value["manifest"]["files"].values())


def test_inspect_truncated_file(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path)
    (bundle / "embed.onnx").write_bytes(b"")
    result = invoke("dflash-export", "inspect", bundle)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "embed.onnx: found 0 bytes" in result.stderr


def test_inspect_shows_engines(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "bundle")
    bundle = Bundle.open(folder)
    record = EngineFile("embed.engine", 3, hashlib.sha256(b"abc").hexdigest())
    right = engine_set(bundle)
    right = replace(right, files={name: replace(record, name=f"{name}.engine") for name in right.files})
    other = replace(
        right,
        build=TRT,
        engines={k: replace(v, sources={"embed.onnx": "1" * 64}) for k, v in right.engines.items()},
    )
    good, bad = store(bundle, right), store(bundle, other)
    (folder / "engines" / "tensorrt-broken").mkdir()
    result = invoke("dflash-export", "inspect", folder)
    assert (result.exit_code, "fits this bundle" in result.stdout) == (0, True)
    lines = {line.split()[0]: line for line in result.stdout.partition("engines\n")[2].splitlines()}
    assert set(lines) == {good.name, bad.name, "tensorrt-broken"}
    facts = "tensorrt-rtx 1.7.1, sm86, sm89, fp32, 24 tokens, batch 1, 0.0 MB"
    assert lines[good.name].split(facts)[1].strip() == "fits this bundle"
    assert "the bundle's embed.onnx: built for sha256 111111111111" in lines[bad.name]
    assert "can't be read" in lines["tensorrt-broken"]

    (good / "target.engine").write_bytes(b"abd")
    result = invoke("dflash-export", "inspect", "--json", folder)
    found = {entry["folder"]: entry for entry in json.loads(result.stdout)["engines"]}
    assert result.exit_code == 1
    assert f"engines/{good.name}/target.engine" in result.stderr
    assert (found[good.name]["changed"], found[bad.name]["changed"]) == (["target.engine"], [])
    assert (found[good.name]["backend"], found[good.name]["max_batch"]) == ("tensorrt-rtx", 1)
    assert invoke("dflash-export", "inspect", "--no-verify", folder).exit_code == 0


# --- generate, on the demo pair ---


def test_generate_streams_text(smollm2_bundle: Bundle) -> None:
    result = invoke(
        "dflash-rt",
        "generate",
        smollm2_bundle.root,
        *("--prompt", "The capital of France is", "--max-new-tokens", "4", "--stats"),
    )
    assert (result.exit_code, result.stdout) == (0, " Paris.\n\n")
    assert "prompt: 5 tokens in" in result.stderr
    assert "output: 4 tokens (length)" in result.stderr
    assert "tokens a step, steps by drafts: " in result.stderr


def test_generate_samples(smollm2_bundle: Bundle) -> None:
    def answer(*options: str) -> dict[str, Any]:
        arguments = ("--prompt", "Once upon a time", "--max-new-tokens", "12", "--json", *options)
        result = invoke("dflash-rt", "generate", smollm2_bundle.root, *arguments)
        assert result.exit_code == 0, result.stderr
        parsed: dict[str, Any] = json.loads(result.stdout)
        return parsed

    greedy = answer()
    assert (greedy["seed"], greedy["logprobs"]) == (None, None)
    values = {"temperature": 0.8, "top-p": 0.95, "top-k": 40, "min-p": 0.01, "repetition-penalty": 1.1}
    values |= {"presence-penalty": 0.1, "frequency-penalty": 0.1, "seed": 7, "logprobs": 2}
    options = [f"--{name}={value}" for name, value in values.items()]
    sampled = answer(*options)
    assert sampled["seed"] == 7
    assert sampled["token_ids"] != greedy["token_ids"]
    assert [item["token_id"] for item in sampled["logprobs"]] == sampled["token_ids"]
    assert {len(item["top"]) for item in sampled["logprobs"]} == {2}
    assert answer(*options, "--no-draft")["token_ids"] == sampled["token_ids"]
    drawn = answer("--temperature", "1")
    assert answer("--temperature", "1", "--seed", str(drawn["seed"]))["token_ids"] == drawn["token_ids"]


def test_generate_from_stdin_or_file_drops_one_newline(smollm2_bundle: Bundle, tmp_path: Path) -> None:
    prompt, length = "The capital of France is", ("--max-new-tokens", "3", "--json")
    file = tmp_path / "prompt.txt"
    file.write_text(prompt + "\n")
    ways: list[tuple[tuple[str, ...], str | None]] = [
        (("--prompt", prompt), None),
        (("--prompt-file", str(file)), None),
        ((), prompt + "\n"),
        (("--prompt-file", "-"), prompt),
    ]
    for way, stdin in ways:
        result = invoke("dflash-rt", "generate", smollm2_bundle.root, *way, *length, stdin=stdin)
        assert json.loads(result.stdout)["stats"]["prompt_tokens"] == 5
        assert json.loads(result.stdout)["text"] == " Paris.\n"


def test_generate_chat_options(smollm2_bundle: Bundle) -> None:
    def answer(*options: str) -> dict[str, Any]:
        arguments = ("--prompt", "Say hello.", "--max-new-tokens", "24", "--json", *options)
        result = invoke("dflash-rt", "generate", smollm2_bundle.root, *arguments)
        assert result.exit_code == 0, result.stderr
        parsed: dict[str, Any] = json.loads(result.stdout)
        return parsed

    chat = answer("--chat")
    assert chat["stats"]["num_draft_tokens"] == 7
    plain = answer("--chat", "--no-draft")
    assert plain["stats"]["num_draft_tokens"] == 0
    assert plain["token_ids"] == chat["token_ids"]
    assert answer("--chat", "--num-draft-tokens", "3")["stats"]["num_draft_tokens"] == 3
    assert (
        answer("--chat", "--system", "Be rude.")["stats"]["prompt_tokens"] != chat["stats"]["prompt_tokens"]
    )
    stopped = answer("--chat", "--stop", chat["text"][3:6], "--stop", "never there")
    assert (stopped["text"], stopped["finish_reason"]) == (chat["text"][:3], "stop")


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--prompt", ""), "the prompt is empty"),
        (("--prompt", "a", "--num-draft-tokens", "8"), "larger than the drafter allows"),
        (("--prompt", "a", "--max-new-tokens", "9000"), "don't fit"),
        (("--prompt", "a", "--stop", ""), "stop"),
    ],
)
def test_generate_refuses(smollm2_bundle: Bundle, options: tuple[str, ...], part: str) -> None:
    result = invoke("dflash-rt", "generate", smollm2_bundle.root, *options)
    assert (result.exit_code, result.stdout) == (1, "")
    assert part in result.stderr


@pytest.mark.parametrize(
    "line",
    [
        "dflash-rt generate BUNDLE --prompt x",
        "dflash-bench run BUNDLE",
        "dflash-bench run WHOLE --baseline BUNDLE",
        "dflash-bench widths BUNDLE",
    ],
)
def test_files_are_compared_on_request(tmp_path: Path, line: str) -> None:
    folders = {"WHOLE": write_bundle(tmp_path / "whole"), "BUNDLE": write_bundle(tmp_path / "bundle")}
    file = folders["BUNDLE"] / "data" / "weights.bin"
    file.write_bytes(file.read_bytes().swapcase())
    words = [folders.get(word, word) for word in line.split()]
    program, *arguments = map(str, words)
    result = invoke(program, *arguments, "--verify-files")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "data/weights.bin: found sha256" in result.stderr
    assert "found sha256" not in invoke(program, *arguments).stderr  # it fails at another place
