"""On-policy data: the target's own greedy answers, in large batches without padding.

All rows of a batch are at the same position, so every row is what the target computes alone (up to the
rounding of a wider batch): the prefill ends where the shortest prompt does, and longer ones are fed their own
tokens until they end. Only token ids are stored, about 4 bytes a token; features are computed again while
training.
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
from transformers.cache_utils import DynamicLayer

from dflash_rt.errors import OutputError
from examples.train_drafter.budget import Budget

__all__ = [
    "SETTINGS_FILE",
    "answer_greedily",
    "continue_all",
    "make_data",
    "plan_batches",
    "write_settings",
]

SETTINGS_FILE = "data.json"
_LOOK_EVERY = 16  # tokens between looks at which rows have ended: each look waits for the device
_SHRINK_BELOW = 0.75  # of the rows still going
_ROOM = 64  # rows that a full cache grows by


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
    remedy = [number for number in range(len(plan)) if not _file(folder, number).is_file()]
    if sealed and remedy:
        raise OutputError(
            f"training has begun on part of the data in {folder}",
            found=f"{len(plan) - len(remedy)} of {len(plan)} batches",
            expected="all of them, or no checkpoint: a run trains on the same data from its start to its end",
            remedy="go on with the train command, or delete the checkpoint to begin again on more data",
        )
    tokens, before = 0, None
    for done, number in enumerate(remedy, len(plan) - len(remedy)):
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
    """Indices of prompts of similar length, ``batch`` together, the batches in random order."""
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    plan = [order[start : start + batch] for start in range(0, len(order), batch)]
    random.Random(seed).shuffle(plan)
    return plan


def answer_greedily(
    model: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop_token_ids: Sequence[int]
) -> list[list[int]]:
    """The target's argmax, token after token; a stop token ends an answer. One answer a prompt.

    Prompts of similar length take the fewest steps.
    """
    return continue_all(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        stop_token_ids=stop_token_ids,
        choose=lambda logits: logits.argmax(-1),
    )


@torch.inference_mode()
def continue_all(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_token_ids: Sequence[int],
    choose: Callable[[torch.Tensor], torch.Tensor],
) -> list[list[int]]:
    """What follows each prompt, a stop token included. ``choose``: logits ``[batch, vocab]`` to tokens."""
    sizes = [len(prompt) for prompt in prompts]
    begins, longest = min(sizes), max(sizes)
    end = longest + max_new_tokens
    padded = torch.zeros(len(prompts), end, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = torch.tensor(list(prompt))
    whole = padded.to(model.device)  # prompts with their answers
    stops = torch.tensor(list(stop_token_ids), dtype=torch.long, device=model.device)
    lengths = torch.tensor(sizes, device=model.device)
    rows = torch.arange(len(prompts), device=model.device)  # those still in the batch
    ended = torch.zeros_like(rows, dtype=torch.bool)
    cache, fed = _cache(model), whole[:, :begins]
    for place in range(begins, end):
        logits = model(fed, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        token = choose(logits)
        if place < longest:
            token = token.where(place >= lengths, whole[rows, place])
        whole[rows, place] = token
        answered = place + 1 - lengths
        ended |= ((answered > 0) & torch.isin(token, stops)) | (answered >= max_new_tokens)
        fed = token[:, None]
        if (place - begins + 1) % _LOOK_EVERY == 0:
            going = (~ended).nonzero()[:, 0]
            if len(going) == 0:
                break
            if len(going) < _SHRINK_BELOW * len(rows):
                cache.batch_select_indices(going)
                rows, ended, fed, lengths = rows[going], ended[going], fed[going], lengths[going]
    answers = [ids[size : size + max_new_tokens] for ids, size in zip(whole.tolist(), sizes, strict=True)]
    return [_cut(answer, set(stop_token_ids)) for answer in answers]


class _RoomyLayer(DynamicLayer):
    """A layer of the cache that grows by many rows at once: the usual one copies everything each step."""

    _whole: list[torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append rows; both results are views, ``[batch, heads, rows, head_dim]``."""
        held, news = self.get_seq_length(), (key_states, value_states)
        rows = held + key_states.shape[-2]
        whole = self._whole
        if whole is None or whole[0].shape[-2] < rows:
            whole = [new.new_empty(*new.shape[:2], rows + _ROOM, new.shape[-1]) for new in news]
            if held:
                for room, old in zip(whole, (self.keys, self.values), strict=True):
                    assert old is not None
                    room[..., :held, :] = old
            self._whole = whole
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        for room, new in zip(whole, news, strict=True):
            room[..., held:rows, :] = new
        self.keys, self.values = (room[..., :rows, :] for room in whole)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows of the batch; the next update makes room again."""
        super().batch_select_indices(indices)  # type: ignore[no-untyped-call]
        self._whole = None


def _cache(model: Any) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    for place, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[place] = _RoomyLayer()  # type: ignore[no-untyped-call]
    return cache


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
            remedy="choose another output folder",
        ) from error
    found, wanted = ({key: json.dumps(value) for key, value in old.items()} for old in (recorded, settings))
    changed = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
    if changed:
        raise OutputError(
            f"{path.parent} was made with other settings",
            found=", ".join(f"{key} {wanted.get(key)}" for key in changed)[:500],
            expected=", ".join(f"{key} {found.get(key)}" for key in changed)[:500],
            remedy="repeat the settings to go on, or choose another output folder",
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
            remedy="free disk space; the batches before this one are kept",
        ) from error
