"""On-policy data: the target's own greedy answers, in batches of prompts of equal length.

Equal lengths need no padding, so every row is what the target computes alone (up to the rounding of a wider
batch). Only token ids are stored, about 4 bytes a token; features are computed again while training.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import DynamicCache

from dflash_rt.errors import OutputError

from .budget import Budget

__all__ = ["SETTINGS_FILE", "answer_greedily", "make_data", "plan_batches", "write_settings"]

SETTINGS_FILE = "data.json"
_LOOK_EVERY = 16  # tokens between looks at which rows have ended: each look waits for the device
_SHRINK_BELOW = 0.75  # of the rows still going


def make_data(
    model: Any,
    prompts: Sequence[Sequence[int]],
    folder: Path,
    *,
    max_new_tokens: int,
    stop_token_ids: Sequence[int],
    batch: int,
    seed: int,
    prompt_source: str,
    budget: Budget,
    log: Callable[[str], None],
    sealed: bool = False,
) -> bool:
    """Answer all prompts, one file a batch; batches that have a file are done. True when all are.

    ``prompts`` are token ids, ready for the answer; ``prompt_source`` says in words where they are from.
    Stops early when the budget allows no more. Files appear whole or not at all. ``sealed``: training has
    begun on what is there.

    Raises:
        OutputError: ``folder`` holds the data of other settings, or is sealed and batches are missing.
    """
    digest = hashlib.sha256(json.dumps([list(p) for p in prompts]).encode()).hexdigest()
    stops = sorted(stop_token_ids)
    settings = {"prompt_source": prompt_source, "prompts": len(prompts), "prompts_sha256": digest}
    settings |= {"max_new_tokens": max_new_tokens, "stop_token_ids": stops, "batch": batch, "seed": seed}
    write_settings(folder / SETTINGS_FILE, settings)
    plan = plan_batches([len(prompt) for prompt in prompts], batch, seed)
    todo = [number for number in range(len(plan)) if not _file(folder, number).is_file()]
    if sealed and todo:
        raise OutputError(
            f"training has begun on part of the data in {folder}",
            found=f"{len(plan) - len(todo)} of {len(plan)} batches",
            expected="all of them, or no checkpoint: a run trains on the same data from its start to its end",
            todo="go on with the train command, or delete the checkpoint to begin again on more data",
        )
    tokens, before = 0, None
    for done, number in enumerate(todo, len(plan) - len(todo)):
        if not budget.allows_another(before):
            log(f"data: out of time with {done} of {len(plan)} batches; the same command goes on")
            return False
        before = budget.seconds
        chosen = [list(prompts[index]) for index in plan[number]]
        answers = answer_greedily(model, chosen, max_new_tokens=max_new_tokens, stop_token_ids=stops)
        _save(_file(folder, number), chosen, answers)
        tokens += sum(map(len, answers))
        log(
            f"data: batch {done + 1}/{len(plan)}, {tokens} new tokens, {tokens / budget.seconds:.0f} a second"
        )
    return True


def plan_batches(lengths: Sequence[int], batch: int, seed: int) -> list[list[int]]:
    """Indices of prompts of equal length, at most ``batch`` together, the batches in random order."""
    by_length: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        by_length.setdefault(length, []).append(index)
    groups = [by_length[length] for length in sorted(by_length)]
    plan = [group[start : start + batch] for group in groups for start in range(0, len(group), batch)]
    random.Random(seed).shuffle(plan)
    return plan


@torch.inference_mode()
def answer_greedily(
    model: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop_token_ids: Sequence[int]
) -> list[list[int]]:
    """The target's argmax, token after token, for prompts of one length; a stop token ends an answer."""
    fed = torch.tensor([list(prompt) for prompt in prompts], device=model.device)
    stops = torch.tensor(list(stop_token_ids), dtype=torch.long, device=model.device)
    answers = fed.new_full((len(prompts), max_new_tokens), -1)
    rows = torch.arange(len(prompts), device=model.device)  # those still in the batch
    ended = torch.zeros_like(rows, dtype=torch.bool)
    cache = DynamicCache(config=model.config)
    for step in range(max_new_tokens):
        logits = model(fed, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        token = logits.argmax(-1)
        answers[rows, step] = token
        ended |= torch.isin(token, stops)
        fed = token[:, None]
        if (step + 1) % _LOOK_EVERY == 0:
            going = (~ended).nonzero()[:, 0]
            if len(going) == 0:
                break
            if len(going) < _SHRINK_BELOW * len(rows):
                cache.batch_select_indices(going)
                rows, ended, fed = rows[going], ended[going], fed[going]
    return [_cut(answer, set(stop_token_ids)) for answer in answers.tolist()]


def _cut(answer: list[int], stops: set[int]) -> list[int]:
    end = next((place + 1 for place, token in enumerate(answer) if token in stops), len(answer))
    return answer[:end]


def write_settings(path: Path, settings: dict[str, Any]) -> None:
    """Record what a folder's contents were made with, or compare with what is recorded there.

    Raises OutputError when it differs or can't be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        recorded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError(
            f"{path} can't be used",
            found=error,
            expected="a folder that is new, or made by this command",
            todo="choose another output folder",
        ) from error
    found, wanted = ({key: json.dumps(value) for key, value in old.items()} for old in (recorded, settings))
    changed = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
    if changed:
        raise OutputError(
            f"{path.parent} was made with other settings",
            found=", ".join(f"{key} {wanted.get(key)}" for key in changed)[:500],
            expected=", ".join(f"{key} {found.get(key)}" for key in changed)[:500],
            todo="repeat the settings to go on, or choose another output folder",
        )


def _file(folder: Path, number: int) -> Path:
    return folder / f"batch-{number:06d}.safetensors"


def _save(path: Path, prompts: list[list[int]], answers: list[list[int]]) -> None:
    together = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    tensors = {
        "ids": torch.tensor([token for ids in together for token in ids], dtype=torch.int32),
        "lengths": torch.tensor([len(ids) for ids in together], dtype=torch.int32),
        "prompt_lengths": torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int32),
    }
    partial = path.with_suffix(".partial")
    try:
        save_file(tensors, partial)
        os.replace(partial, path)
    except OSError as error:
        raise OutputError(
            f"can't write {path}",
            found=error,
            expected="a writable folder with room for the data",
            todo="free disk space; the batches before this one are kept",
        ) from error
