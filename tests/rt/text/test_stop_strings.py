from __future__ import annotations

from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from dflash_rt.errors import GeneratorStateError, PromptError, RequestError
from dflash_rt.text.stop_strings import StopStrings, TextAssembler
from dflash_rt.text.tokenizer import Tokenizer

small_text = st.text(alphabet="ab", max_size=30)
stop_lists = st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=4)
many = settings(max_examples=300, deadline=None)


def cut_naively(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The specification: try every end, then every stop string, longest first."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


def may_begin_a_stop(text: str, stops: list[str]) -> bool:
    return any(stop.startswith(text) for stop in stops)


@many
@given(pieces=st.lists(small_text, max_size=8), stops=stop_lists)
def test_the_text_is_cut_as_specified_however_it_comes(pieces: list[str], stops: list[str]) -> None:
    text = "".join(pieces)
    expected, stop = cut_naively(text, stops)
    matcher = StopStrings(stops)
    emitted = ""
    for piece in pieces:
        emitted += matcher.feed(piece)
        assert expected.startswith(emitted), "what was emitted can't be taken back"
        if matcher.found is not None:
            break
    assert emitted + matcher.flush() == expected
    assert matcher.found == stop


@many
@given(pieces=st.lists(small_text, max_size=8), stops=stop_lists)
def test_no_more_is_held_back_than_needed(pieces: list[str], stops: list[str]) -> None:
    matcher = StopStrings(stops)
    fed = emitted = ""
    for piece in pieces:
        fed += piece
        emitted += matcher.feed(piece)
        if matcher.found is not None:
            return
        held = fed[len(emitted) :]
        assert held == "" or may_begin_a_stop(held, stops)
        # The longest end that may begin a stop string is held, all of it.
        longer = [fed[i:] for i in range(len(emitted))]
        assert not any(may_begin_a_stop(end, stops) for end in longer)


@pytest.mark.parametrize(
    ("stops", "pieces", "emitted", "found"),
    [
        (["\n\n"], ["one\n", "\ntwo"], ["one", ""], "\n\n"),
        (["\n\n"], ["one\n", "two\n"], ["one", "\ntwo"], None),
        (["abcd", "bc"], ["ab", "cd"], ["", "a"], "bc"),
        (["b", "ab"], ["xa", "b"], ["x", ""], "ab"),
        (["END"], ["E", "N", "E", "N", "D"], ["", "", "EN", "", ""], "END"),
        (["aab"], ["aaa", "ab"], ["a", "a"], "aab"),
        (["é"], ["caf", "é!"], ["caf", ""], "é"),
        ([], ["any", ""], ["any", ""], None),
    ],
)
def test_examples(stops: list[str], pieces: list[str], emitted: list[str], found: str | None) -> None:
    matcher = StopStrings(stops)
    assert [matcher.feed(piece) for piece in pieces] == emitted
    assert matcher.found == found


def test_feeding_after_a_stop_string_is_an_error() -> None:
    matcher = StopStrings(("x",))
    assert matcher.feed("axb") == "a"
    with pytest.raises(GeneratorStateError, match="after a stop string"):
        matcher.feed("c")
    assert matcher.flush() == ""


def test_flush_forgets_what_was_matched() -> None:
    matcher = StopStrings(["ab"])
    assert matcher.feed("a") == ""
    assert matcher.flush() == "a"
    assert matcher.feed("b") == "b"


@pytest.mark.parametrize("stops", ["\n", b"x", [""], ["a", ""], [1], [None], None, 3, {"a"}, [["a"]]])
def test_bad_stop_strings_are_refused(stops: Any) -> None:
    with pytest.raises(RequestError) as caught:
        StopStrings(stops)
    assert "stop strings can't be used" in str(caught.value)
    assert "expected: a list of strings that aren't empty" in str(caught.value)
    with pytest.raises(RequestError, match="stop strings can't be used"):
        TextAssembler(None, stops)


# --- with tokens ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Byte-level, one token a byte, and the special token <end>."""
    vocab = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<end>"])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return Tokenizer(path)


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def test_tokens_end_with_the_one_that_completes_the_stop_string(tokenizer: Tokenizer) -> None:
    assembler = TextAssembler(tokenizer, ["é\n"])
    tokens = ids(tokenizer, "caféé\nmore")
    first = assembler.push(tokens[:4])
    assert first == ("caf", tuple(tokens[:4]), False)
    text, kept, stopped = assembler.push(tokens[4:])
    assert (text, stopped) == ("é", True)
    assert tokenizer.decode(tokens[:4] + list(kept)) == "caféé\n"
    assert assembler.found == "é\n"
    assert assembler.flush() == ("", (), True)
    with pytest.raises(GeneratorStateError, match="after a stop string"):
        assembler.push(tokens[:1])


@many
@given(
    text=st.text(alphabet="aé\n", max_size=12),
    stops=st.lists(st.sampled_from(["é", "aa", "\né"])),
    data=st.data(),
)
def test_blocks_of_any_size_give_the_same(
    tokenizer: Tokenizer, text: str, stops: list[str], data: st.DataObject
) -> None:
    tokens = ids(tokenizer, text)
    expected, stop = cut_naively(text, stops)
    assembler = TextAssembler(tokenizer, stops)
    pieces: list[str] = []
    kept: list[int] = []
    position = 0
    while position < len(tokens) and assembler.found is None:
        size = data.draw(st.integers(1, 5))
        piece, block, stopped = assembler.push(tokens[position : position + size])
        pieces.append(piece)
        kept += block
        position += size
        assert stopped == (assembler.found is not None)
    pieces.append(assembler.flush().text)
    assert "".join(pieces) == expected
    assert assembler.found == stop
    assert tokenizer.decode(kept) == (text if stop is None else expected + stop)


def test_special_tokens_do_not_break_a_stop_string(tokenizer: Tokenizer) -> None:
    tokens = [*ids(tokenizer, "xE"), *ids(tokenizer, "<end>"), *ids(tokenizer, "ND")]
    assembler = TextAssembler(tokenizer, ["END"])
    assert assembler.push(tokens) == ("x", tuple(tokens), True)


def test_what_is_held_at_the_end_is_flushed(tokenizer: Tokenizer) -> None:
    assembler = TextAssembler(tokenizer, ["\n\n"])
    assert assembler.push([*ids(tokenizer, "a\n"), ids(tokenizer, "é")[0]]).text == "a"
    assert assembler.flush() == ("\n�", (), False)


def test_a_stop_string_in_the_flushed_text_counts(tokenizer: Tokenizer) -> None:
    assembler = TextAssembler(tokenizer, ["a�"])
    tokens = [*ids(tokenizer, "xa"), ids(tokenizer, "é")[0]]
    assert assembler.push(tokens) == ("x", tuple(tokens), False)
    assert assembler.flush() == ("", (), True)
    assert assembler.found == "a�"


def test_without_tokenizer_there_is_no_text() -> None:
    assembler = TextAssembler(None)
    assert assembler.push([1, 2]) == ("", (1, 2), False)
    assert assembler.flush() == ("", (), False)
    with pytest.raises(PromptError, match="stop strings need a tokenizer"):
        TextAssembler(None, ["x"])
