"""The command ``dflash-export``. Commands import what they need when they run so that ``--help`` is fast."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from dflash_export.click_options import build_options, engine_options, take_engine_options
from dflash_export.options import REQUIRED
from dflash_rt.cli.console import CommandGroup, echo, echo_json, fail
from dflash_rt.text.prompt_files import as_chats, read_prompts
from dflash_rt.version import __version__

__all__ = ["choose_precision", "main"]

_COUNT = click.IntRange(min=1)
_BUNDLE = click.argument("bundle", type=click.Path(path_type=Path))


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="dflash-export")
def main() -> None:
    """Export a Hugging Face target and its DFlash drafter to a bundle that runs without PyTorch."""


@main.command()
@click.option("--recipe", type=click.Path(path_type=Path), help="YAML file with the options below.")
@build_options
def build(recipe: Path | None, **options: Any) -> None:
    """Export a pair to a bundle.

    Options win over the recipe's. The bundle appears whole or not at all. With --backend its engines are
    built afterwards, as `dflash-export compile` does.
    """
    engines = take_engine_options(options)
    given = {name: value for name, value in options.items() if value is not None}
    # A recipe without a suffix would be its own output folder.
    if recipe is not None and recipe.suffix:
        given.setdefault("output", recipe.with_suffix(""))
    wanted = REQUIRED if recipe is None else ("output",)
    if missing := [f"--{name}" for name in wanted if not given.get(name)]:
        raise click.UsageError(f"{' and '.join(missing)} must be given{'' if recipe else ', or --recipe'}")
    from dflash_export.progress import make_progress
    from dflash_export.recipe import override, read_recipe

    if "target" in given:
        given["target"] = _located(given["target"])
    chosen = override({} if recipe is None else read_recipe(recipe), given)

    if engines:
        from dflash_export.engines.compiler import check_options, compile_engines
        from dflash_export.engines.options import EngineOptions

        chosen = choose_precision(chosen, engines["backend"])
        # Now, and not after an export that takes minutes.
        engine_options = EngineOptions(chosen["output"], **engines)
        check_options(engine_options, chosen["precision"], chosen.get("quantize"))

    from dflash_export.exporter import build as build_bundle

    progress = make_progress()
    bundle = build_bundle(**chosen, progress=progress)
    if engines:
        _echo_notes(compile_engines(bundle, progress=progress, **engines).notes)
    if bundle.manifest.quantization is not None:
        from dflash_export.inspection import describe_quantization

        click.echo("\n".join(describe_quantization(bundle.manifest.quantization)), err=True)
    echo(bundle.root)


@main.command("compile")
@_BUNDLE
@engine_options
def compile_bundle(bundle: Path, **options: Any) -> None:
    """Build the engines of a bundle for a GPU, and keep them in the bundle.

    Prints their folder. Engines that are there already are not built again.
    """
    from dflash_export.engines.compiler import compile_engines
    from dflash_export.progress import make_progress

    given = {name: value for name, value in options.items() if value is not None}
    result = compile_engines(bundle, progress=make_progress(), **given)
    click.echo(f"built {len(result.built)}, reused {len(result.reused)}", err=True)
    _echo_notes(result.notes)
    echo(result.folder)


@main.command()
@_BUNDLE
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, the manifest included.")
@click.option("--verify/--no-verify", "verify_files", default=True, help="Compare the SHA-256 of every file.")
def inspect(bundle: Path, as_json: bool, verify_files: bool) -> None:
    """Show what a bundle holds and where it came from, and check its files."""
    from dflash_export.inspection import inspect_bundle
    from dflash_export.progress import make_progress
    from dflash_rt import Bundle

    report = inspect_bundle(Bundle.open(bundle), verify_files=verify_files, progress=make_progress())
    if as_json:
        echo_json(report.to_dict())
    else:
        echo(report.table())
    if report.changed:
        fail(
            f"files of {bundle} are not those that were recorded: {', '.join(report.changed)}\n"
            "  what to do: copy the bundle again, or build it again with `dflash-export build --force`"
        )


@main.command()
@_BUNDLE
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    help="Text file with a prompt a line, or a .json list. By default a few built-in ones.",
)
@click.option("--limit", type=_COUNT, metavar="N", help="Only the first N prompts of the file.")
@click.option("--chat", is_flag=True, help="Each prompt of the file is the user's message of a chat.")
@click.option("--max-new-tokens", type=_COUNT, metavar="N", default=128, show_default=True)
@click.option(
    "--recipe", type=click.Path(path_type=Path), help="Recipe of the bundle: names its checkpoints."
)
@click.option("--target", metavar="SOURCE", help="The target, where the bundle doesn't record a hub id.")
@click.option("--drafter", metavar="SOURCE", help="The drafter, likewise; for the reference's loop.")
@click.option("--reference/--no-reference", default=True, help="Also run the loop of PyPI dflash.")
@click.option("--threads", type=_COUNT, metavar="N", help="CPU threads of ONNX Runtime.")
@click.option("--report/--no-report", "write_report", default=True, help="Write it into the bundle, too.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def verify(
    bundle: Path, prompts: Path | None, limit: int | None, chat: bool, as_json: bool, **options: Any
) -> None:
    """Compare drafted, plain and PyTorch's greedy tokens, and explain every difference.

    PyTorch runs the target that the bundle was built from. Exits with 1 if a difference is more than a near
    tie. The report is also written to reports/verify.json in the bundle.
    """
    if prompts is None and (limit is not None or chat):
        raise click.UsageError("--limit and --chat are about a file: give --prompts as well")
    from dflash_export.progress import make_progress
    from dflash_export.recipe import read_recipe

    recipe = options.pop("recipe")
    chosen = {} if recipe is None else read_recipe(recipe)
    options["target"] = _located(options["target"] or chosen.get("target"))
    options["drafter"] = options["drafter"] or chosen.get("drafter")
    texts = None if prompts is None else read_prompts(prompts, limit)

    from dflash_export.parity.run import verify as verify_bundle
    from dflash_export.parity.table import render

    report = verify_bundle(
        bundle,
        prompts=as_chats(texts) if chat and texts is not None else texts,
        progress=make_progress(),
        **options,
    )
    if as_json:
        echo_json(report.to_dict())
    else:
        echo(render(report))
    if not report.ok:
        fail("this bundle doesn't compute what PyTorch computes; the lines that begin with 'bug:' say where")


def choose_precision(options: Mapping[str, Any], backend: str) -> dict[str, Any]:
    """A build's options with bf16 if they leave the precision open, and says so.

    A GPU's attention is fused, and its caches are half as large, in 16 bits only; bf16 has fp32's range.
    """
    if "precision" not in options:
        click.echo(f"precision: bf16, for engines of {backend} (--precision chooses another)", err=True)
    return {"precision": "bf16", **options}


def _echo_notes(notes: Sequence[str]) -> None:
    for note in notes:
        click.echo(f"note: {note}", err=True)


def _located(source: str | None) -> str | None:
    """A target as :func:`dflash_export.build` takes it: ``package:NAME/FILE`` becomes a path."""
    from dflash_export.recipe import PACKAGE_PREFIX, locate_package_file

    if source is None or not source.startswith(PACKAGE_PREFIX):
        return source
    return str(locate_package_file(source))
