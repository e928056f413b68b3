"""The command ``dflash-rt``. Subcommands import heavy packages when they run, so ``--help`` is fast."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from dflash_rt.cli.console import CommandGroup, JsonPair, echo, echo_json
from dflash_rt.cli.options import BACKEND, BACKEND_OPTION, BUNDLE, COUNT, THREADS, VERIFY_FILES
from dflash_rt.text.prompt_files import as_chats, read_text
from dflash_rt.version import __version__

if TYPE_CHECKING:
    from dflash_rt.stream import GenerationResult

__all__ = ["main"]

_SAMPLING_HELP = {
    "temperature": (float, "0 is greedy; 1 is the model's own distribution."),
    "top_p": (float, "Only the most probable tokens that together reach this probability."),
    "top_k": (int, "Only this many most probable tokens; 0 is all."),
    "min_p": (float, "Only tokens at least this times as probable as the best."),
    "repetition_penalty": (float, "Divides logits of tokens that came before, prompt included; 1 is none."),
    "presence_penalty": (float, "Subtracted from logits of tokens that came in the output."),
    "frequency_penalty": (float, "Subtracted once for each time that the token came in the output."),
    "seed": (int, "Same seed, same text. Drawn by default; --json reports it."),
    "logprobs": (int, "With --json: log-probability of each token and of this many best ones."),
}


class _NumDraftTokens(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions of click only
    """A number of tokens, or ``auto``."""

    name = "N|auto"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | Literal["auto"]:
        """The number or ``auto``, or a usage error."""
        if value == "auto":
            return "auto"
        return int(click.IntRange(min=0).convert(value, param, ctx))


def _sampling_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add one option for each field of SamplingParams; ``None`` if it isn't given."""
    for name, (kind, text) in reversed(_SAMPLING_HELP.items()):
        flag = "--" + name.replace("_", "-")
        command = click.option(flag, name, type=kind, metavar="X", help=text)(command)
    return command


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="dflash-rt")
def main() -> None:
    """Run a DFlash bundle: speculative decoding without PyTorch."""


@main.command()
@BUNDLE
@click.option("--prompt", metavar="TEXT", help="The prompt. Without it, or a file, stdin is read.")
@click.option(
    "--prompt-file", type=click.Path(path_type=Path), help="UTF-8 file with the prompt; - is stdin."
)
@click.option("--chat", is_flag=True, help="The prompt is the user's message of a chat.")
@click.option("--system", metavar="TEXT", help="System message of the chat.")
@click.option(
    "--chat-template-kwarg",
    "chat_template_kwargs",
    type=JsonPair(),
    multiple=True,
    help="Variable for the chat template, like enable_thinking=false. May be repeated.",
)
@click.option(
    "--max-new-tokens", type=COUNT, metavar="N", help="By default as many as fit the bundle's limit."
)
@click.option("--stop", metavar="TEXT", multiple=True, help="Stop before this text. May be repeated.")
@_sampling_options
@click.option("--no-draft", is_flag=True, help="Plain decoding: the same tokens, one at a time.")
@click.option(
    "--num-draft-tokens",
    type=_NumDraftTokens(),
    help="Tokens that a step drafts: one number for all steps, or auto. By default each step's own, up to "
    "the bundle's.",
)
@BACKEND
@BACKEND_OPTION
@THREADS
@VERIFY_FILES
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end instead of text.")
@click.option("--stats", is_flag=True, help="Print times and drafting statistics on stderr.")
def generate(
    bundle: Path,
    prompt: str | None,
    prompt_file: Path | None,
    chat: bool,
    system: str | None,
    chat_template_kwargs: tuple[tuple[str, Any], ...],
    max_new_tokens: int | None,
    stop: tuple[str, ...],
    no_draft: bool,
    num_draft_tokens: int | Literal["auto"] | None,
    backend: str,
    backend_options: tuple[tuple[str, Any], ...],
    threads: int | None,
    verify_files: bool,
    as_json: bool,
    stats: bool,
    **sampling: float | int | None,
) -> None:
    """Continue a prompt, or answer a chat, and print the text as it comes.

    One newline at the end of a file or of stdin is not part of the prompt. Sampling options default to the
    bundle's; --temperature 0 is greedy decoding.
    """
    if not chat and (system is not None or chat_template_kwargs):
        raise click.UsageError("--system and --chat-template-kwarg belong to a chat: give --chat as well")
    if no_draft and num_draft_tokens is not None:
        raise click.UsageError("--no-draft and --num-draft-tokens exclude each other")
    text = _prompt_text(prompt, prompt_file)

    from dflash_rt import Generator, SamplingParams

    given: dict[str, Any] = {name: value for name, value in sampling.items() if value is not None}
    SamplingParams(**given)  # refuses wrong values before the bundle is opened
    with (
        Generator(
            bundle,
            backend,
            threads=threads,
            backend_options=dict(backend_options),
            num_draft_tokens=num_draft_tokens,
            verify_files=verify_files,
        ) as generator,
        generator.stream(
            _messages(text, system) if chat else text,
            max_new_tokens=max_new_tokens,
            sampling=replace(generator.limits.sampling, **given),
            stop=stop,
            speculative=not no_draft,
            chat_template_kwargs=dict(chat_template_kwargs) or None,
        ) as stream,
    ):
        for chunk in stream:
            if not as_json:
                echo(chunk.text, nl=False)
    result = stream.result
    if as_json:
        echo_json(_as_json(result))
    elif not result.text.endswith("\n"):
        echo()
    if stats:
        click.echo(_stats_text(result), err=True)


def _prompt_text(prompt: str | None, prompt_file: Path | None) -> str:
    if prompt is not None and prompt_file is not None:
        raise click.UsageError("--prompt and --prompt-file exclude each other")
    if prompt is not None:
        return prompt
    if prompt_file is None and sys.stdin.isatty():
        raise click.UsageError("no prompt: give --prompt or --prompt-file, or pipe it in")
    return read_text(prompt_file or Path("-"))


def _messages(text: str, system: str | None) -> list[dict[str, str]]:
    opening = [] if system is None else [{"role": "system", "content": system}]
    return [*opening, *as_chats([text])[0]]


def _as_json(result: GenerationResult) -> dict[str, Any]:
    return {
        "text": result.text,
        "token_ids": list(result.token_ids),
        "finish_reason": result.finish_reason,
        "seed": result.seed,
        "logprobs": None if result.logprobs is None else [asdict(item) for item in result.logprobs],
        "stats": result.stats.as_dict(),
    }


def _stats_text(result: GenerationResult) -> str:
    stats = result.stats
    speed = f"{stats.decode_seconds:.2f} s, {stats.tokens_per_second:.1f} tokens/s"
    lines = [
        f"prompt: {stats.prompt_tokens} tokens in {stats.prefill_seconds:.2f} s",
        f"output: {stats.new_tokens} tokens ({result.finish_reason}) in {speed}",
    ]
    if stats.num_draft_tokens and stats.steps:
        pairs = zip(stats.accepted_by_position, stats.drafted_by_position, strict=True)
        shares = " ".join(f"{accepted / drafted:.0%}" for accepted, drafted in pairs if drafted)
        steps = ", ".join(f"{drafts}: {count}" for drafts, count in stats.steps_by_draft_tokens.items())
        lines.append(
            f"drafts: {stats.tokens_per_step:.2f} tokens a step, steps by drafts: {steps}; "
            f"accepted by position: {shares or '-'}"
        )
    return "\n".join(lines)
