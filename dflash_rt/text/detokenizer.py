"""Decodes token ids one at a time; the pieces joined are exactly the text of all ids at once.

``tokenizers.decoders.DecodeStream`` isn't used: it has no flush, it holds back all text behind invalid UTF-8,
and with byte fallback it emits a character before a later byte makes the whole run invalid
(``<0xE2><0x82><0xAC><0xFF>`` is four replacement characters, not a euro sign).
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from dflash_rt.errors import IntegrityError, PromptError

if TYPE_CHECKING:
    import tokenizers

__all__ = ["IncrementalDecoder", "Vocabulary", "incremental_decoder"]


class IncrementalDecoder(Protocol):
    """Turns ids into text as they come; special tokens and ids outside the vocabulary give no text."""

    def push(self, token_id: int) -> str:
        """Text that later ids can't change any more; never a part of a character."""

    def flush(self) -> str:
        """The text held back so far. Afterwards the decoder can take another sequence."""


class Vocabulary:
    """A tokenizer's tokens by id; None for those that decoding skips."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder().values()
        self._special = frozenset(token.content for token in added if token.special)

    def token(self, token_id: int) -> str | None:
        """The token; None for special tokens and unknown ids. Raises PromptError for what can't be an id."""
        try:
            token = self._tokenizer.id_to_token(token_id)
        except (OverflowError, TypeError) as error:
            raise bad_id(token_id) from error
        return None if token is None or token in self._special else token

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of ids for which :meth:`token` isn't None."""
        with no_panic():
            return self._tokenizer.decode(token_ids, skip_special_tokens=False)


@contextmanager
def no_panic() -> Iterator[None]:
    """Raise IntegrityError where the tokenizers library panics, as it does on some malformed tokenizers.

    The panic's class, a BaseException, can't be imported, so it is recognised by its name.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise IntegrityError(
            "the tokenizer failed",
            found=str(error)[:200],
            expected="a tokenizer that can encode any text and decode any ids",
            remedy="check tokenizer.json against the original model's",
        ) from error


def bad_id(found: object) -> PromptError:
    """The error for what can't be a token id."""
    return PromptError(
        "a token id can't be decoded",
        found=repr(found)[:80],
        expected="integers from 0 to 2**32 - 1",
        remedy="pass the token ids that the model or the tokenizer gave",
    )


def incremental_decoder(tokenizer: tokenizers.Tokenizer, vocabulary: Vocabulary) -> IncrementalDecoder:
    """The decoder that fits how the tokenizer joins tokens."""
    steps = _steps(tokenizer)
    if [step["type"] for step in steps] == ["ByteLevel"]:
        return _ByteDecoder(vocabulary)
    if _is_local(steps):
        return _PieceDecoder(vocabulary, any(step["type"] == "ByteFallback" for step in steps))
    return _WholeDecoder(vocabulary)


def _steps(tokenizer: tokenizers.Tokenizer) -> list[dict[str, Any]]:
    """The tokenizer's decoder as a flat list of steps; without any, tokens are joined by spaces."""

    def flatten(step: dict[str, Any]) -> list[dict[str, Any]]:
        if step["type"] != "Sequence":
            return [step]
        return [inner for each in step["decoders"] for inner in flatten(each)]

    decoder = tokenizer.decoder
    # __getstate__ is the decoder's own JSON; the whole tokenizer's JSON holds the vocabulary, too.
    return [] if decoder is None else flatten(json.loads(decoder.__getstate__()))


def _is_local(steps: Sequence[dict[str, Any]]) -> bool:
    """Whether a token's text depends only on being the first, and on byte tokens next to it."""
    fused = False
    for i, step in enumerate(steps):
        kind = step["type"]
        if kind == "Fuse":
            fused = True
        elif fused:
            # All text is one string by now: of later steps only stripping its start leaves later text alone.
            if kind != "Strip" or step["stop"] != 0:
                return False
        elif kind == "ByteFallback":
            # No earlier step may make another token look like <0x41>. Inserting a space can't.
            if any(earlier["type"] != "Replace" or earlier["content"] != " " for earlier in steps[:i]):
                return False
        elif kind not in ("Metaspace", "Replace", "Strip", "WordPiece"):
            return False
    return True


def _byte_alphabet() -> dict[str, int]:
    """The characters that stand for bytes in byte-level BPE: printable bytes stand for themselves.

    Source: GPT-2's ``bytes_to_unicode``, which byte-level tokenizers share.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


class _ByteDecoder:
    """Byte-level BPE: the bytes of all tokens, joined, are one UTF-8 text."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        # Like the tokenizer's, it gives one replacement character for each longest invalid part.
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        token = self._vocabulary.token(token_id)
        if token is None:
            return ""
        try:
            data = bytes([_BYTE_OF[character] for character in token])
        except KeyError:  # an added token that is plain text
            data = token.encode("utf-8")
        return self._utf8.decode(data)

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _PieceDecoder:
    """SentencePiece-like and word-piece tokenizers: the first token's text differs from that of later ones.

    New tokens are decoded behind a context, one token with text, so that they aren't decoded as the first.
    """

    def __init__(self, vocabulary: Vocabulary, byte_fallback: bool) -> None:
        self._vocabulary = vocabulary
        self._byte_fallback = byte_fallback
        self._context: list[int] = []
        self._context_text = ""
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        token = self._vocabulary.token(token_id)
        if token is None:
            return ""
        self._pending.append(token_id)
        # A run of byte tokens is valid or invalid as a whole: wait for its end.
        if self._byte_fallback and _may_be_byte(token):
            return ""
        text = self._vocabulary.decode(self._context + self._pending)
        piece = text[len(self._context_text) :]
        if not text:  # nothing but stripped spaces so far: the next token may still count as the first
            return ""
        if len(self._context) != 1:
            alone = self._vocabulary.decode([token_id])
            # A token without text ("▁" alone) can't be the context: keep the present one until another comes.
            if alone:
                self._context, self._context_text = [token_id], alone
            elif not self._context:
                self._context, self._context_text = self._pending, text
        self._pending = []
        return piece

    def flush(self) -> str:
        text = self._vocabulary.decode(self._context + self._pending)
        piece = text[len(self._context_text) :]
        self._context, self._context_text, self._pending = [], "", []
        return piece


class _WholeDecoder:
    """Any other tokenizer: a later token may change all text before it, so all text is held back."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._token_ids: list[int] = []

    def push(self, token_id: int) -> str:
        if self._vocabulary.token(token_id) is not None:
            self._token_ids.append(token_id)
        return ""

    def flush(self) -> str:
        text = self._vocabulary.decode(self._token_ids)
        self._token_ids = []
        return text


def _may_be_byte(token: str) -> bool:
    """Whether byte fallback may read the token as one byte, as it does ``<0x0A>``."""
    return token.startswith("<0x") and token.endswith(">")
