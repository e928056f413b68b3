"""The frozen target: its weights, its tokenizer with the chat template, and the features that are tapped."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dflash_export.errors import RecipeError
from dflash_export.recipe import PACKAGE_PREFIX, locate_package_file
from dflash_export.reference import load_target
from dflash_export.sources.resolve import Source, resolve_target
from dflash_export.sources.tokenizer import export_tokenizer
from dflash_export.targets.config import load_target_config, stop_token_ids
from dflash_rt.text.prompt_files import as_chats
from dflash_rt.text.prompts import PromptEncoder
from dflash_rt.text.tokenizer import Tokenizer

__all__ = ["Target", "features_of", "find_target", "freeze", "open_target"]


@dataclass(frozen=True)
class Target:
    """A target on one device. ``model`` is transformers' causal LM; nothing of it is ever trained."""

    source: Source
    model: Any
    encoder: PromptEncoder
    stop_token_ids: tuple[int, ...]

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of each prompt as the only user message of a chat, up to where the answer begins."""
        return [list(self.encoder.encode(chat, None)) for chat in as_chats(prompts)]

    def tokens(self, text: str) -> list[int]:
        """Token ids of a bare text."""
        return self._tokenizer.encode(text, add_special_tokens=False)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""
        return self._tokenizer.decode(token_ids)

    @property
    def _tokenizer(self) -> Tokenizer:
        assert self.encoder.tokenizer is not None  # checked by open_target
        return self.encoder.tokenizer


def find_target(spec: str) -> Source:
    """A target as ``dflash-export build`` takes it: hub id, folder, ``.gguf`` file, ``package:NAME/FILE``."""
    return resolve_target(locate_package_file(spec) if spec.startswith(PACKAGE_PREFIX) else spec)


def open_target(
    spec: str, *, device: torch.device, dtype: torch.dtype, template_kwargs: Mapping[str, Any]
) -> Target:
    """Load a target.

    Raises RecipeError when it has no chat template, and what the exporter's own readers raise.
    """
    source = find_target(spec)
    config = load_target_config(source)
    with tempfile.TemporaryDirectory() as folder:
        files = export_tokenizer(source, Path(folder))
        if files is None or files.chat_template is None:
            raise RecipeError(
                "the target can't be asked anything",
                found="no tokenizer" if files is None else "no chat template",
                expected="a tokenizer with a chat template: the drafter is trained on the target's answers",
                remedy="use an instruction-tuned target, or put chat_template.jinja beside its config.json",
            )
        encoder = files.encoder(Path(folder), template_kwargs)
    return Target(
        source, freeze(load_target(source, dtype).to(device)), encoder, stop_token_ids(source, config)
    )


def freeze(model: Any) -> Any:
    """The same model without gradients: the drafter shares embedding and head, and they stay as they are."""
    return model.eval().requires_grad_(False)


@torch.no_grad()
def features_of(model: Any, ids: torch.Tensor, feature_layers: Sequence[int]) -> torch.Tensor:
    """What the reference taps: ``hidden_states[layer + 1]``, side by side, ``[batch, rows, taps * hidden]``.

    ``ids`` int64 ``[batch, rows]``, padded at the end: the target is causal, so rows before are as without.
    """
    hidden = model(ids, use_cache=False, output_hidden_states=True, logits_to_keep=1).hidden_states
    return torch.cat([hidden[layer + 1] for layer in feature_layers], dim=-1)
