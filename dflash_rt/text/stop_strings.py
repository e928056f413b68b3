"""Finds stop strings wherever tokens cut the text, and joins tokens to text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dflash_rt.errors import GeneratorStateError, PromptError, RequestError
from dflash_rt.text.tokenizer import Tokenizer

__all__ = ["Assembled", "StopStrings", "TextAssembler"]


class StopStrings:
    """Ends a text that comes in pieces just before its first complete stop string.

    The first one is the one whose last character comes first; of several that end on the same character it is
    the longest. So the result depends on the text alone, not on the pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Raises RequestError unless ``stops`` is a list or tuple of strings that aren't empty."""
        self._matchers = [_Matcher(stop) for stop in _checked_stops(stops)]
        self._held = ""
        self._found: str | None = None

    @property
    def found(self) -> str | None:
        """The stop string that ended the text, or None so far."""
        return self._found

    def feed(self, piece: str) -> str:
        """Text that can be emitted now: all but the longest ending that may be the start of a stop string.

        Once a stop string is complete, the text up to it is returned, :attr:`found` is set, and feeding more
        raises GeneratorStateError.
        """
        if self._found is not None:
            raise GeneratorStateError(
                "text was fed after a stop string",
                found=f"{self._found!r} ended the text",
                expected="no more text",
                remedy="check `found` after every piece",
            )
        text = self._held + piece
        for i, character in enumerate(piece, start=len(self._held) + 1):
            complete = [matcher.stop for matcher in self._matchers if matcher.advance(character)]
            if complete:
                self._found = max(complete, key=len)
                self._held = ""
                return text[: i - len(self._found)]
        keep = len(text) - max((matcher.matched for matcher in self._matchers), default=0)
        self._held = text[keep:]
        return text[:keep]

    def flush(self) -> str:
        """The text held back so far, which isn't part of a stop string. The text ends here."""
        held, self._held = self._held, ""
        for matcher in self._matchers:
            matcher.matched = 0
        return held


class _Matcher:
    """Follows one stop string through a text, one character at a time (Knuth, Morris and Pratt)."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.matched = 0  # length of the longest ending of the text that starts the stop string
        # For each length n: the longest proper prefix of stop[:n] that is also a suffix of it.
        self._shorter = [0] * (len(stop) + 1)
        for length in range(2, len(stop) + 1):
            self._shorter[length] = self._next(self._shorter[length - 1], stop[length - 1])

    def advance(self, character: str) -> bool:
        """True if ``character`` completes the stop string."""
        self.matched = self._next(self.matched, character)
        return self.matched == len(self.stop)

    def _next(self, matched: int, character: str) -> int:
        while matched and self.stop[matched] != character:
            matched = self._shorter[matched]
        return matched + 1 if self.stop[matched] == character else 0


class Assembled(NamedTuple):
    """Text that tokens add. ``token_ids`` are all of them or, if ``stopped``, up to the completing token."""

    text: str
    token_ids: tuple[int, ...]
    stopped: bool


class TextAssembler:
    """The text of one sequence, built token by token and ended by the first stop string.

    Without a tokenizer the text is always empty. A token completes a stop string once the text certainly
    contains it. With byte-fallback tokenizers that may be the token after a character's last byte.
    """

    def __init__(self, tokenizer: Tokenizer | None, stops: Sequence[str] = ()) -> None:
        """Raises RequestError for bad stop strings, PromptError for any without a tokenizer."""
        self._stops = StopStrings(stops)
        if tokenizer is None and stops:
            raise PromptError(
                "stop strings need a tokenizer",
                found="a bundle without one",
                expected="no stop strings",
                remedy="use stop_token_ids, or export the target with its tokenizer",
            )
        self._decoder = None if tokenizer is None else tokenizer.incremental()

    @property
    def found(self) -> str | None:
        """The stop string that ended the text, or None so far."""
        return self._stops.found

    def push(self, token_ids: Sequence[int]) -> Assembled:
        """Add tokens. Raises GeneratorStateError once a stop string has ended the text."""
        pieces = []
        for count, token_id in enumerate(token_ids, start=1):
            pieces.append(self._stops.feed("" if self._decoder is None else self._decoder.push(token_id)))
            if self._stops.found is not None:
                return Assembled("".join(pieces), tuple(token_ids[:count]), True)
        return Assembled("".join(pieces), tuple(token_ids), False)

    def flush(self) -> Assembled:
        """The text held back so far, after the last token. It too may hold a stop string.

        The text is empty after a stop string. ``token_ids`` is always empty.
        """
        if self._stops.found is not None or self._decoder is None:
            return Assembled("", (), self._stops.found is not None)
        text = self._stops.feed(self._decoder.flush())
        return Assembled(text + self._stops.flush(), (), self._stops.found is not None)


def _checked_stops(stops: object) -> Sequence[str]:
    # A str is a sequence as well: each of its characters would be a stop string.
    if not isinstance(stops, list | tuple):
        raise _bad_stops(stops)
    for stop in stops:
        if not isinstance(stop, str) or not stop:
            raise _bad_stops(stop)
    return stops


def _bad_stops(found: object) -> RequestError:
    return RequestError(
        "the stop strings can't be used",
        found=repr(found)[:80],
        expected="a list of strings that aren't empty",
        remedy='pass for example stop=["\\n\\n"]',
    )
