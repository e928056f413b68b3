"""Prompts that the target writes itself: after the words that open a user's turn it goes on as a user would.

A chat model was trained on conversations, so what it samples there looks like what it is asked. The idea is
Magpie's (arXiv 2406.08464). Left alone, a model has its favourites (SmolLM2 asks for plans and recipes, and
hardly ever why something is so), so every second prompt is given its first words. Temperature 1, with min-p.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from dflash_export.errors import RecipeError
from dflash_rt.errors import OutputError
from examples.train_drafter.generation import continue_all, write_settings
from examples.train_drafter.prompts import lines_of, normalised
from examples.train_drafter.target import Target

__all__ = ["BEGINNINGS", "opening", "read_beginnings", "self_prompts", "write_prompts"]

BEGINNINGS = Path(__file__).with_name("beginnings.txt")

_LONGEST = 64  # tokens of a prompt; longer ones are mostly rambling
_MIN_P = 0.05
_FEWEST = 0.02  # of what is tried: with fewer new prompts in as many tries, the target has no more to say
_TRIES = 64
# Different in their first and last letters, so that what all chats begin with is the template's alone.
_PROBES = ("Why is it so?", "an old house", "5 by 7", "(none)")


def opening(target: Target) -> list[int]:
    """Token ids of a chat up to where its first user message begins. Raises RecipeError if there are none."""
    chats = target.encode(_PROBES)
    shared = 0
    while len({tuple(chat[: shared + 1]) for chat in chats}) == 1:
        shared += 1
    if shared == 0:
        raise RecipeError(
            "the target can't be asked for prompts",
            found="a chat template that writes nothing before a user's message",
            expected="a template that marks where a user's turn begins",
            remedy="leave out --self-prompts, and give --prompt-file or --prompts",
        )
    return chats[0][:shared]


def read_beginnings(path: Path) -> list[str]:
    """First words for prompts, one a line; an empty file has none. Raises PromptError if it can't be read."""
    return [line.strip() for _, line in lines_of(path)]


def self_prompts(
    target: Target,
    count: int,
    *,
    beginnings: Sequence[str],
    batch: int,
    seed: int,
    held_out: Collection[str],
    log: Callable[[str], None],
) -> list[str]:
    """``count`` distinct prompts, none of them held out. Half of what is tried begins with a beginning.

    Raises RecipeError when the target has too few to write.
    """
    start = opening(target)
    free: list[int] = []
    # In turn: free, the first beginning, free, the second one, …
    firsts = itertools.cycle([ids for text in beginnings for ids in (free, target.tokens(text))] or [free])
    draw = torch.Generator(device=target.model.device).manual_seed(seed)
    seen = {normalised(prompt) for prompt in held_out}
    prompts: list[str] = []
    tried, before = 0, 0
    while len(prompts) < count:
        rows = list(itertools.islice(firsts, batch))
        turns = continue_all(
            target.model,
            [start + first for first in rows],
            max_new_tokens=_LONGEST,
            stop_token_ids=target.stop_token_ids,
            choose=lambda logits: _sample(logits, draw),
        )
        for first, turn in zip(rows, turns, strict=True):
            *written, last = turn
            text = target.decode(first + written).strip()
            key = normalised(text)
            whole = last in target.stop_token_ids and target.decode(written).strip()
            if whole and len(key.split()) > 1 and key not in seen:
                seen.add(key)
                prompts.append(text)
        log(f"prompts: {len(prompts)} of {count}")
        tried += batch
        if tried < _TRIES:
            continue
        if len(prompts) - before < _FEWEST * tried:
            raise RecipeError(
                "the target writes too few prompts of its own",
                found=f"{len(prompts) - before} new ones in the last {tried}, {len(prompts)} in all",
                expected=f"{count} distinct ones that end within {_LONGEST} tokens",
                remedy="lower --self-prompts, and add --prompts or a --prompt-file",
            )
        tried, before = 0, len(prompts)
    return prompts[:count]


def _sample(logits: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    scores = logits.float()
    least = scores.amax(-1, keepdim=True) + math.log(_MIN_P)
    scores = scores.masked_fill(scores < least, -math.inf)
    # The largest score plus Gumbel noise is a sample of their softmax.
    noise = torch.empty_like(scores).exponential_(generator=draw).log_()
    return (scores - noise).argmax(-1)


def write_prompts(path: Path, make: Callable[[], list[str]], settings: dict[str, Any]) -> list[str]:
    """The prompts in ``path``, made and written if it isn't there; a file of other settings is refused.

    Sampling is not the same on every machine, so an interrupted run must find its prompts again.

    Raises OutputError when the file was made with other settings, or can't be read or written.
    """
    recorded = path.with_name("prompts-settings.json")
    # Before anything is recorded: if this fails, other settings may do.
    prompts = None if path.is_file() else make()
    try:
        if prompts is not None:
            recorded.unlink(missing_ok=True)
        write_settings(recorded, settings)
        if prompts is None:
            found: list[str] = json.loads(path.read_text(encoding="utf-8"))
            return found
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(prompts, ensure_ascii=False, indent=0), encoding="utf-8")
        partial.replace(path)
    except (OSError, ValueError) as error:
        raise OutputError(
            f"the prompts in {path} can't be used",
            found=error,
            expected="a file that this command wrote, or a writable folder",
            remedy="delete the file to have prompts written anew, or choose another output folder",
        ) from error
    return prompts
