"""``python -m examples.train_drafter``: data, train, evaluate, or run for all three."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from dflash_rt.cli.console import CommandGroup, JsonPair, echo_json
from examples.train_drafter.prompts import HELD_OUT

__all__ = ["main"]

F = TypeVar("F", bound=Callable[..., Any])

_COUNT = click.IntRange(min=1)
_MINUTES = click.FloatRange(min=0, min_open=True)

_COMMON = [
    click.option(
        "--target", required=True, metavar="SOURCE", help="Hub id, folder, .gguf or package:NAME/FILE."
    ),
    click.option(
        "-o",
        "--output",
        required=True,
        type=click.Path(path_type=Path, file_okay=False),
        help="Folder of the run.",
    ),
    click.option("--device", help="As PyTorch names it. By default cuda where there is one, else cpu."),
    click.option(
        "--precision", type=click.Choice(["fp32", "bf16"]), help="By default bf16 on cuda, else fp32."
    ),
    click.option(
        "--chat-template-kwarg",
        "template_kwargs",
        type=JsonPair(),
        multiple=True,
        help="Like enable_thinking=false.",
    ),
    click.option(
        "--held-out",
        type=click.Path(path_type=Path),
        default=HELD_OUT,
        help="Prompts that training never sees.",
    ),
    click.option("--seed", type=int, default=0, show_default=True),
]
_DATA = [
    click.option(
        "--prompt-file", type=click.Path(path_type=Path), help="Prompts of your own instead of the templates."
    ),
    click.option(
        "--prompts",
        "prompt_count",
        type=click.IntRange(min=0),
        help="From the templates, or the first of --prompt-file [20000, or 0 with --self-prompts alone].",
    ),
    click.option(
        "--self-prompts",
        type=click.IntRange(min=0),
        default=0,
        show_default=True,
        help="Besides, this many that the target writes itself.",
    ),
    click.option(
        "--beginnings",
        type=click.Path(path_type=Path),
        help="First words for every second of --self-prompts, one a line [beginnings.txt here].",
    ),
    click.option(
        "--max-new-tokens", type=_COUNT, default=192, show_default=True, help="Of each answer, at most."
    ),
    click.option(
        "--data-batch", type=_COUNT, help="Prompts answered together. By default 512 on cuda, else 16."
    ),
    click.option("--data-minutes", type=_MINUTES, help="Stop making data then; the same command goes on."),
]
_TRAIN = [
    click.option("--init-from", metavar="SOURCE", help="Drafter to train on; a new one by default."),
    click.option("--layers", type=_COUNT, help="Of a new drafter [3]."),
    click.option(
        "--taps", metavar="I,J,…", help="Target layers whose output a new drafter reads; spread by default."
    ),
    click.option(
        "--mask-token-id", type=click.IntRange(min=0), help="Of a new drafter: a token that never occurs."
    ),
    click.option(
        "--block-size", type=click.IntRange(min=2), help="Anchor included [8, or that of --init-from]."
    ),
    click.option("--steps", type=_COUNT, help="End of the run in steps."),
    click.option("--minutes", type=_MINUTES, help="End of the run in minutes, all calls together."),
    click.option(
        "--stop-after", type=_MINUTES, help="End this call after so many minutes; the same command goes on."
    ),
    click.option("--batch", type=_COUNT, default=16, show_default=True, help="Sequences a step."),
    click.option(
        "--anchors", type=_COUNT, default=64, show_default=True, help="Anchors a sequence, at most."
    ),
    click.option("--learning-rate", type=_MINUTES, default=6e-4, show_default=True),
    click.option("--gamma", type=_MINUTES, help="Decay of the loss over a block; the paper's by default."),
    click.option(
        "--validation", type=click.IntRange(min=0), default=64, show_default=True, help="Sequences kept."
    ),
    click.option(
        "--compile/--no-compile", "compiled", default=None, help="FlexAttention and torch.compile [on cuda]."
    ),
]
_EVALUATE = [
    click.option(
        "--widths", default="4,8", show_default=True, help="Rows of a verify pass, anchor included."
    ),
    click.option(
        "--evaluation-tokens", type=_COUNT, default=128, show_default=True, help="New tokens a prompt."
    ),
    click.option("--limit", type=_COUNT, help="Of the held-out prompts, the first N."),
    click.option(
        "--before/--no-before", default=True, help="Also evaluate the drafter as it was before training."
    ),
]


def options(*groups: list[Callable[[F], F]]) -> Callable[[F], F]:
    """One decorator for several groups of options."""

    def decorate(function: F) -> F:
        for option in reversed([option for group in groups for option in group]):
            function = option(function)
        return function

    return decorate


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Train a DFlash v1 drafter on a target's own answers. See README.md beside this file."""


@main.command()
@options(_COMMON, _DATA)
def data(**given: Any) -> None:
    """Let the target answer the training prompts; goes on where an earlier call stopped."""
    from examples.train_drafter import stages

    stages.data(stages.open_run(given), given)


@main.command()
@options(_COMMON, _TRAIN)
def train(**given: Any) -> None:
    """Train on the data and write the drafter with its card; goes on from the last checkpoint."""
    from examples.train_drafter import stages

    stages.train(stages.open_run(given), given)


@main.command()
@options(_COMMON, _EVALUATE)
def evaluate(**given: Any) -> None:
    """Measure tokens a step on the held-out prompts, before and after training."""
    from examples.train_drafter import stages

    echo_json(stages.evaluate(stages.open_run(given), given))


@main.command()
@options(_COMMON, _DATA, _TRAIN, _EVALUATE)
def run(**given: Any) -> None:
    """Make data, train, evaluate and write the card: all of it in one command.

    Each part begins when the one before is done: where --data-minutes or --stop-after ends a call early, the
    same command goes on there.
    """
    from examples.train_drafter import stages

    opened = stages.open_run(given)
    if not stages.data(opened, given):
        stages.log("run: stopped before training; the same command goes on with the data")
    elif not stages.train(opened, given):
        stages.log("run: stopped before the evaluation; the same command goes on with training")
    else:
        echo_json(stages.evaluate(opened, given))


if __name__ == "__main__":
    main(prog_name="python -m examples.train_drafter")
