"""Text to token ids and back, from a bundle's ``tokenizer.json``."""

from __future__ import annotations

import os
from collections.abc import Sequence

from dflash_rt.errors import IntegrityError, PromptError
from dflash_rt.text.detokenizer import IncrementalDecoder, Vocabulary, bad_id, incremental_decoder, no_panic

__all__ = ["IncrementalDecoder", "Tokenizer"]


class Tokenizer:
    """Encodes and decodes like the model's own fast tokenizer. May be used from several threads."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Load ``tokenizer.json``. Raises IntegrityError if it can't be read or isn't a tokenizer."""
        import tokenizers

        try:
            with no_panic():
                self._tokenizer = tokenizers.Tokenizer.from_file(os.fspath(path))
        except Exception as error:  # the library raises plain Exception for a bad file
            raise IntegrityError(
                f"the tokenizer {os.fspath(path)} can't be loaded",
                found=str(error)[:200],
                expected="a tokenizer.json as the tokenizers library writes it",
                remedy="copy the bundle again, or build it again with `dflash-export build --force`",
            ) from error
        # Truncation and padding would change a prompt silently.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._vocabulary = Vocabulary(self._tokenizer)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of ``text``; special tokens written out in it become their ids.

        ``add_special_tokens`` adds the tokens that the tokenizer puts around a text, such as a BOS token.
        Raises PromptError if ``text`` isn't valid text.
        """
        if not isinstance(text, str):
            raise PromptError(
                "the prompt isn't text",
                found=type(text).__name__,
                expected="str",
                remedy="pass a str, chat messages or token ids",
            )
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise PromptError(
                "the prompt can't be written as UTF-8",
                found=f"an unpaired surrogate at character {error.start}",
                expected="valid Unicode text",
                remedy="decode the text with the right encoding, or with errors='replace'",
            ) from error
        with no_panic():
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of ``token_ids``. Special tokens and ids outside the vocabulary give no text.

        Raises PromptError for a value that can't be a token id.
        """
        try:
            with no_panic():
                return self._tokenizer.decode(token_ids, skip_special_tokens=True)
        except (OverflowError, TypeError) as error:
            raise bad_id(token_ids) from error

    def incremental(self) -> IncrementalDecoder:
        """A decoder for one sequence of ids.

        Its pushes and its flush together give exactly ``decode`` of all ids.
        """
        return incremental_decoder(self._tokenizer, self._vocabulary)
