"""Encodes a prompt: text, a chat or token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from dflash_rt.errors import PromptError, RequestError
from dflash_rt.text.chat import render
from dflash_rt.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from dflash_rt.bundle.folder import Bundle

__all__ = ["Prompt", "PromptEncoder", "TokenIds"]

TokenIds: TypeAlias = "Sequence[int] | npt.NDArray[np.integer[Any]]"

Prompt: TypeAlias = "str | Sequence[Mapping[str, Any]] | TokenIds"
"""Text, chat messages such as ``{"role": "user", "content": "…"}``, or token ids (ints ``[rows]``)."""


@dataclass(frozen=True)
class PromptEncoder:
    """A bundle's tokenizer and chat template. Without a tokenizer it takes token ids only.

    ``template_kwargs`` are the bundle's defaults for the template's own variables.
    """

    tokenizer: Tokenizer | None = None
    chat_template: str | None = None
    bos_token: str | None = None
    eos_token: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_bundle(cls, bundle: Bundle) -> PromptEncoder:
        """Read the bundle's tokenizer files. Raises IntegrityError if they can't be read."""
        spec, path = bundle.manifest.tokenizer, bundle.tokenizer_path()
        if spec is None or path is None:
            return cls()
        return cls(
            tokenizer=Tokenizer(path),
            chat_template=bundle.read_chat_template(),
            bos_token=spec.bos_token,
            eos_token=spec.eos_token,
            template_kwargs=bundle.manifest.generation.chat_template_kwargs,
        )

    def encode(self, prompt: Prompt, template_kwargs: Mapping[str, Any] | None) -> TokenIds:
        """Token ids of a prompt. Ids pass unchanged; the caller checks them against the vocabulary.

        Text gets the special tokens that the tokenizer adds by itself. A chat gets none: its template
        writes them.

        Raises:
            PromptError: text or a chat without a tokenizer, or a wrong type.
            ChatTemplateError: there is no chat template, or it fails.
            RequestError: ``template_kwargs`` for a prompt that isn't a chat.
        """
        is_chat = isinstance(prompt, list | tuple) and len(prompt) > 0 and isinstance(prompt[0], Mapping)
        kwargs: object = template_kwargs
        if kwargs is not None and not (is_chat and isinstance(kwargs, Mapping)):
            raise RequestError(
                "chat_template_kwargs can't be used",
                found=f"{kwargs!r}, with {'a chat' if is_chat else 'a prompt that is no chat'}",
                expected="a dict, together with a list of messages",
                remedy="pass messages such as [{'role': 'user', 'content': …}], or leave it out",
            )
        if isinstance(prompt, str):
            return self._tokenizer_for("text").encode(prompt, add_special_tokens=True)
        if is_chat:
            tokenizer = self._tokenizer_for("a chat")
            text = render(
                cast("Sequence[Mapping[str, Any]]", prompt),
                self.chat_template,
                bos_token=self.bos_token,
                eos_token=self.eos_token,
                kwargs={**self.template_kwargs, **(template_kwargs or {})},
            )
            return tokenizer.encode(text, add_special_tokens=False)
        if isinstance(prompt, list | tuple | range | np.ndarray):
            return cast(TokenIds, prompt)
        raise PromptError(
            "the prompt has a wrong type",
            found=type(prompt).__name__,
            expected="a str, a list of messages, or a list of token ids",
            remedy="convert it first; a tensor with .tolist(), bytes with .decode()",
        )

    def _tokenizer_for(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise PromptError(
                "the bundle has no tokenizer",
                found=f"{what} as the prompt",
                expected="a list of token ids",
                remedy="encode the prompt yourself, or export the target with its tokenizer",
            )
        return self.tokenizer
