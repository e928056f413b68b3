"""The command ``dflash-bench``. Commands import what they need when they run, so that ``--help`` is fast."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dflash_bench.gpu.backend_spec import FUSED, NO_GRAPH, BackendSpec
from dflash_bench.gpu.shapes import PAIRS, PRECISIONS
from dflash_rt.cli.console import CommandGroup, echo, echo_json
from dflash_rt.cli.options import BACKEND, BACKEND_OPTION, BUNDLE, COUNT, THREADS, VERIFY_FILES
from dflash_rt.errors import BackendUnavailableError, RequestError
from dflash_rt.text.prompt_files import as_chats, read_prompts
from dflash_rt.version import __version__

if TYPE_CHECKING:
    from dflash_rt.text.prompts import Prompt

__all__ = ["main"]

_PATH = click.Path(path_type=Path)


class _Parsed(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions of click only
    """A text that ``parse`` reads; what it refuses is wrong usage."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """What was read, or a usage error."""
        if not isinstance(value, str):  # click may convert a value that is converted already
            return value
        try:
            return self._parse(value)
        except (BackendUnavailableError, RequestError) as error:
            self.fail(str(error), param, ctx)


def _systems(text: str) -> tuple[str, ...]:
    """Names of systems to compare with, in the order given, each once."""
    from dflash_bench.systems.registry import find_factories

    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    find_factories(names)
    return names


_SHARED_OPTIONS = (
    BUNDLE,
    click.option("--prompts", type=_PATH, help="Text file with a prompt a line, or .json list."),
    click.option("--limit", type=COUNT, metavar="N", help="Only the first N prompts of the file."),
    click.option("--chat", is_flag=True, help="Each prompt of the file is the user's message of a chat."),
    click.option("--max-new-tokens", type=COUNT, metavar="N", default=128, show_default=True),
    click.option(
        "--repeats", type=COUNT, metavar="N", default=3, show_default=True, help="Runs over all prompts."
    ),
    click.option(
        "--num-draft-tokens",
        type=COUNT,
        metavar="N",
        multiple=True,
        help="Tokens that a step drafts. May be repeated. By default the bundle's own number, or for widths "
        "some up to what the drafter drafts.",
    ),
    BACKEND,
    BACKEND_OPTION,
    THREADS,
    VERIFY_FILES,
    click.option("--plot", type=_PATH, help="PNG file to write."),
    click.option("--json", "as_json", is_flag=True, help="Print the JSON line only, without the table."),
)


def _shared_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(_SHARED_OPTIONS):
        command = option(command)
    return command


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="dflash-bench")
def main() -> None:
    """Measure a DFlash bundle: speed, gain and parity, on a CPU or a GPU."""


@main.command()
@_shared_options
@click.option(
    "--compare",
    type=_Parsed("NAME,...", _systems),
    default=(),
    help="Also run: hf (Hugging Face generate), reference (the PyTorch loop), genai (onnxruntime-genai), "
    "genai-int4 (its own int4); all skips what can't run here.",
)
@click.option(
    "--baseline",
    type=_PATH,
    metavar="BUNDLE",
    help="Also run another bundle of the same vocabulary, such as the one that isn't quantised.",
)
@click.option("--recipe", type=_PATH, help="Recipe of the bundle: names its checkpoints.")
@click.option("--target", metavar="SOURCE", help="Checkpoint for hf, reference and genai.")
@click.option("--drafter", metavar="SOURCE", help="Checkpoint for reference.")
@click.option("--cache-folder", type=_PATH, help="Keeps what was converted for genai.")
def run(as_json: bool, **options: Any) -> None:
    """Measure drafted against plain decoding, and both against others. Ends with one line of JSON."""
    from dflash_bench.run.measure import run_bench
    from dflash_bench.run.report import render

    _measure(run_bench, render, as_json, **options)


@main.command()
@_shared_options
def widths(as_json: bool, **options: Any) -> None:
    """Measure the number of draft tokens that adapts against fixed ones, over a mix of prompts."""
    from dflash_bench.widths.measure import run_widths
    from dflash_bench.widths.report import render

    _measure(run_widths, render, as_json, **options)


@main.command()
@click.option("--dry-run", is_flag=True, help="On a CPU, with tiny pairs: shows that the suite runs.")
@click.option(
    "--minutes",
    type=click.FloatRange(1, 600),
    default=8.0,
    show_default=True,
    help="The whole run takes no longer.",
)
@click.option(
    "--backend",
    "backends",
    type=_Parsed("NAME", BackendSpec.parse),
    multiple=True,
    help=f"NAME, NAME{FUSED} or NAME{NO_GRAPH}. May be repeated: pairs are measured on the first that works.",
)
@click.option("--pair", "pairs", type=click.Choice(list(PAIRS)), multiple=True, help="May be repeated; all.")
@click.option(
    "--precision",
    "precisions",
    type=click.Choice(PRECISIONS),
    multiple=True,
    help="May be repeated; bf16 and fp8.",
)
@click.option(
    "--context", "contexts", type=COUNT, metavar="ROWS", multiple=True, help="May be repeated; 1024 and 8192."
)
@click.option("--bundle", type=_PATH, help="A bundle of real weights, such as the demo pair's.")
@click.option("--scratch", type=_PATH, help="Folder for what is built; 40 GB for qwen3-8b.")
@click.option("--keep", is_flag=True, help="Leave bundles and engines there for another run.")
@click.option(
    "--output",
    type=_PATH,
    help="File for the JSON report; the page lies beside it. By default in benchmarks/results.",
)
def gpu(dry_run: bool, **options: Any) -> None:
    """Check tokens and measure steps on a GPU, in one run that ends in time; see benchmarks/README.md."""
    from dflash_bench.gpu.plan import make_plan
    from dflash_bench.gpu.report import DRY_RUN_WARNING
    from dflash_bench.gpu.watch import run_in_time
    from dflash_export.engines.devices import present_gpu

    if not dry_run and present_gpu() is None:
        raise click.UsageError("There is no GPU here. --dry-run shows on a CPU that the suite runs.")
    plan = make_plan(dry_run=dry_run, **options)
    done = run_in_time(plan)
    if dry_run:
        click.echo(DRY_RUN_WARNING, err=True)
    if plan.output.exists():
        echo(plan.output.with_suffix(".md").read_text(encoding="utf-8"))
        click.echo(plan.output, err=True)
    sys.exit(0 if done else 1)


def _measure(
    measure: Callable[..., Any],
    render: Callable[[Any], str],
    as_json: bool,
    *,
    bundle: Path,
    prompts: Path | None,
    limit: int | None,
    chat: bool,
    verify_files: bool,
    backend_options: tuple[tuple[str, Any], ...],
    **options: Any,
) -> None:
    if prompts is None and (limit is not None or chat):
        raise click.UsageError("--limit and --chat are about a file: give --prompts as well")
    asked: Sequence[Prompt] | None = None
    if prompts is not None:
        texts = read_prompts(prompts, limit)
        asked = as_chats(texts) if chat else texts
    if verify_files:
        from dflash_rt.bundle.folder import Bundle

        for folder in (bundle, options.get("baseline")):
            if folder is not None:
                Bundle.open(folder, verify_files=True)
    report = measure(
        bundle=bundle,
        prompts=asked,
        backend_options=dict(backend_options),
        progress=lambda line: click.echo(line, err=True),
        **options,
    )
    if not as_json:
        echo(render(report))
    echo_json(report.to_dict())
