from __future__ import annotations

import functools
import itertools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from dflash_rt.errors import IntegrityError, PromptError
from dflash_rt.text.detokenizer import Vocabulary, incremental_decoder
from dflash_rt.text.tokenizer import Tokenizer

CORPUS = [
    "the cat and the dog — naïve café",
    "日本語のテキスト",
    "🙂🙃 emoji 👩‍👩‍👧",
    "  spaces   and\n\nlines\t",
] * 8
many = settings(max_examples=100, deadline=None)


def byte_level() -> tokenizers.Tokenizer:
    """Byte-level BPE with merges that end in the middle of characters, as real ones have."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    return with_added_tokens(made)


def with_added_tokens(made: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    made.add_special_tokens(["<s>", "</s>", AddedToken("<|a b|>")])
    made.add_tokens(["<tool>", AddedToken("é é"), AddedToken("éé"), AddedToken("▁▁")])
    return made


def pieces(decoder: decoders.Decoder | None, *, byte_tokens: bool = True) -> tokenizers.Tokenizer:
    """A SentencePiece-like vocabulary with every awkward piece, under any decoder."""
    names = [
        "<unk>",
        "▁",
        "▁the",
        "▁▁",
        "the",
        "a",
        "▁a▁",
        ".",
        "##ed",
        "é",
        "日",
        " ",
        "x</w>",
        "",
        "|",
        "�",
        "<0x",
    ]
    if byte_tokens:
        names += [f"<0x{byte:02X}>" for byte in range(256)]
    vocab = {name: i for i, name in enumerate(names)}
    made = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    if decoder is not None:
        made.decoder = decoder
    return with_added_tokens(made)


def chain(*steps: decoders.Decoder) -> decoders.Decoder:
    return decoders.Sequence(list(steps))


def to_space() -> decoders.Decoder:
    return decoders.Replace("▁", " ")


STREAMING: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "byte level": byte_level,
    "byte level in a sequence": lambda: with_decoder(byte_level(), chain(decoders.ByteLevel())),
    "llama 2": lambda: pieces(
        chain(to_space(), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0))
    ),
    "gemma": lambda: pieces(chain(to_space(), decoders.ByteFallback(), decoders.Fuse())),
    "strip two": lambda: pieces(
        chain(to_space(), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 2, 0))
    ),
    "metaspace": lambda: pieces(decoders.Metaspace()),
    "metaspace first": lambda: pieces(decoders.Metaspace(prepend_scheme="first")),
    "metaspace never": lambda: pieces(decoders.Metaspace(prepend_scheme="never")),
    "metaspace, fused": lambda: pieces(chain(decoders.Fuse(), decoders.Strip("▁", 1, 0))),
    "word piece": lambda: pieces(decoders.WordPiece()),
    "byte fallback alone": lambda: pieces(decoders.ByteFallback()),
    "byte fallback, metaspace": lambda: pieces(chain(decoders.ByteFallback(), decoders.Metaspace())),
    "strip each": lambda: pieces(chain(decoders.Strip("a", 1, 0), decoders.Strip("▁", 1, 0))),
    "regex": lambda: pieces(chain(decoders.Replace(Regex("[▁x]+"), ""), decoders.Fuse())),
    "no decoder": lambda: pieces(None),
}
HELD: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "bpe suffix": lambda: pieces(decoders.BPEDecoder()),
    "ctc": lambda: pieces(decoders.CTC("|", "a")),
    "replace when fused": lambda: pieces(chain(decoders.Fuse(), decoders.Replace("ab", "c"))),
    "replace into bytes": lambda: pieces(chain(decoders.Replace("▁", ""), decoders.ByteFallback())),
    "bytes when fused": lambda: pieces(chain(decoders.Fuse(), decoders.ByteFallback())),
}


def with_decoder(made: tokenizers.Tokenizer, decoder: decoders.Decoder) -> tokenizers.Tokenizer:
    made.decoder = decoder
    return made


@functools.cache
def load(kind: str) -> Tokenizer:
    """Saved and loaded again, as a bundle's tokenizer is."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        (STREAMING | HELD)[kind]().save(str(path))
        return Tokenizer(path)


def stream(tokenizer: Tokenizer, token_ids: Sequence[int]) -> list[str]:
    """Pieces of every push, and of the flush."""
    decoder = tokenizer.incremental()
    return [decoder.push(token_id) for token_id in token_ids] + [decoder.flush()]


@st.composite
def any_ids(draw: st.DrawFn, kind: str) -> list[int]:
    """Ids with runs of bytes, special tokens and ids that don't exist."""
    size = load(kind).vocab_size
    common = st.integers(0, min(size - 1, 20))
    added = st.integers(max(0, size - 7), size + 2)
    return draw(st.lists(st.one_of(common, added, st.integers(0, size - 1)), max_size=25))


@pytest.mark.parametrize("kind", STREAMING | HELD)
def test_the_pieces_are_the_text_of_all_ids(kind: str) -> None:
    tokenizer = load(kind)

    @many
    @given(any_ids(kind))
    def check(token_ids: list[int]) -> None:
        assert "".join(stream(tokenizer, token_ids)) == tokenizer.decode(token_ids)

    check()


@pytest.mark.parametrize("kind", STREAMING | HELD)
def test_all_short_sequences_of_awkward_tokens(kind: str) -> None:
    tokenizer = load(kind)
    awkward = [
        token for token in range(tokenizer.vocab_size) if token < 17 or token >= tokenizer.vocab_size - 7
    ]
    for token_ids in itertools.product(awkward[:24], repeat=3):
        assert "".join(stream(tokenizer, token_ids)) == tokenizer.decode(token_ids), token_ids


# One byte of each kind that UTF-8 tells apart.
BYTES = [0x41, 0x80, 0x9F, 0xA0, 0xBF, 0xC1, 0xC3, 0xE0, 0xE2, 0xED, 0xF0, 0xF4, 0xF5, 0xFF]


def byte_ids(kind: str, data: bytes) -> list[int]:
    """The ids of single bytes, in either kind of vocabulary."""
    inner = load(kind)._tokenizer
    if kind == "byte level":
        vocab = inner.get_vocab()
        alphabet = {c: i for i, c in enumerate([*map(chr, PRINTABLE), *map(chr, range(256, 256 + 68))])}
        by_byte = dict(
            zip([*PRINTABLE, *(b for b in range(256) if b not in PRINTABLE)], alphabet, strict=True)
        )
        return [vocab[by_byte[byte]] for byte in data]
    found = [inner.token_to_id(f"<0x{byte:02X}>") for byte in data]
    assert None not in found
    return [token for token in found if token is not None]


PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]


@pytest.mark.parametrize("kind", ["byte level", "llama 2", "gemma"])
def test_invalid_utf8_is_replaced_as_the_tokenizer_does(kind: str) -> None:
    tokenizer = load(kind)
    one_each = {byte: byte_ids(kind, bytes([byte]))[0] for byte in BYTES}
    for length in range(1, 5):
        for data in itertools.product(BYTES if length < 4 else BYTES[:1] + BYTES[6:12], repeat=length):
            token_ids = [one_each[byte] for byte in data]
            assert "".join(stream(tokenizer, token_ids)) == tokenizer.decode(token_ids), data


@pytest.mark.parametrize("kind", ["byte level", "llama 2", "gemma"])
@many
@given(text=st.text(max_size=10))
def test_no_piece_has_half_a_character(kind: str, text: str) -> None:
    text = text.replace("�", "")
    tokenizer = load(kind)
    emitted = stream(tokenizer, byte_ids(kind, text.encode()))
    assert all("�" not in piece for piece in emitted)
    assert "".join(emitted) == (text.removeprefix(" ") if kind == "llama 2" else text)


def test_characters_come_with_their_last_byte() -> None:
    tokenizer = load("byte level")
    assert stream(tokenizer, byte_ids("byte level", "a€b".encode())) == ["a", "", "", "€", "b", ""]
    assert stream(tokenizer, byte_ids("byte level", b"\xff\xffa\xe2\x82")) == ["�", "�", "a", "", "", "�"]


def test_byte_runs_come_when_they_have_ended() -> None:
    tokenizer = load("llama 2")
    the, end = tokenizer._tokenizer.token_to_id("▁the"), tokenizer._tokenizer.token_to_id("</s>")
    assert the is not None
    assert end is not None
    euro, bad = byte_ids("llama 2", "€".encode()), byte_ids("llama 2", b"\xff")
    assert stream(tokenizer, [*euro, the, end, the]) == ["", "", "", "€ the", "", " the", ""]
    assert stream(tokenizer, [the, *euro, *bad]) == ["the", "", "", "", "", "����"]


@pytest.mark.parametrize("kind", [kind for kind in STREAMING if not kind.startswith("byte")])
@many
@given(data=st.data())
def test_nothing_is_held_back_behind_a_plain_token(kind: str, data: st.DataObject) -> None:
    tokenizer = load(kind)
    token_ids = [*data.draw(any_ids(kind)), 5]  # "a"
    *emitted, held = stream(tokenizer, token_ids)
    assert held == ""
    assert "".join(emitted) == tokenizer.decode(token_ids)


@pytest.mark.parametrize("kind", HELD)
def test_other_decoders_hold_everything_to_the_end(kind: str) -> None:
    *emitted, held = stream(load(kind), [2, 5, 7, 5])
    assert set(emitted) == {""}
    assert held != ""


def strip_the_end() -> tokenizers.Tokenizer:
    """Not among the others: the library panics when nothing is left to strip."""
    return pieces(chain(decoders.Fuse(), decoders.Strip("a", 0, 1)))


def test_a_decoder_that_strips_the_end_holds_everything(tmp_path: Path) -> None:
    strip_the_end().save(str(tmp_path / "t.json"))
    tokenizer = Tokenizer(tmp_path / "t.json")
    assert stream(tokenizer, [4, 5, 5]) == ["", "", "", tokenizer.decode([4, 5, 5])]


def test_a_panic_of_the_library_is_an_integrity_error(tmp_path: Path) -> None:
    strip_the_end().save(str(tmp_path / "t.json"))
    tokenizer = Tokenizer(tmp_path / "t.json")
    with pytest.raises(IntegrityError, match="the tokenizer failed"):
        tokenizer.decode([13])  # ""
    with pytest.raises(IntegrityError, match="the tokenizer failed"):
        stream(tokenizer, [13])


@pytest.mark.parametrize("kind", STREAMING | HELD)
def test_after_a_flush_the_decoder_is_as_new(kind: str) -> None:
    tokenizer = load(kind)
    decoder = tokenizer.incremental()
    for token_ids in ([2, 5, 19], [2, 5], [258, 2]):
        text = "".join([decoder.push(token_id) for token_id in token_ids]) + decoder.flush()
        assert text == tokenizer.decode(token_ids)


class CountingVocabulary(Vocabulary):
    decoded = 0

    def decode(self, token_ids: Sequence[int]) -> str:
        self.decoded += len(token_ids)
        return super().decode(token_ids)


@pytest.mark.parametrize("first", [2, 1])  # "▁" alone, the second, has no text in some of them
@pytest.mark.parametrize("kind", STREAMING | HELD)
def test_work_grows_with_the_length_and_no_faster(kind: str, first: int) -> None:
    inner = STREAMING[kind]() if kind in STREAMING else HELD[kind]()
    vocabulary = CountingVocabulary(inner)
    decoder = incremental_decoder(inner, vocabulary)
    # A long run of bytes first, so that it isn't dragged along as context; then tokens and bytes in turn.
    token_ids = [40] * 500 + [first, 5, 40, 1, 3] * 200
    for token_id in token_ids:
        decoder.push(token_id)
    decoder.flush()
    assert vocabulary.decoded <= 4 * len(token_ids)


# --- encoding and loading -----------------------------------------------------------------------------


def test_encoding_adds_special_tokens_only_when_asked(tmp_path: Path) -> None:
    made = byte_level()
    bos = made.token_to_id("<s>")
    assert bos is not None
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    made.save(str(tmp_path / "t.json"))
    tokenizer = Tokenizer(tmp_path / "t.json")
    plain = tokenizer.encode("the café", add_special_tokens=False)
    assert tokenizer.encode("the café", add_special_tokens=True) == [bos, *plain]
    assert tokenizer.decode([bos, *plain]) == "the café"
    assert tokenizer.encode("<s>", add_special_tokens=False) == [bos]
    assert tokenizer.vocab_size == made.get_vocab_size()


def test_truncation_and_padding_in_the_file_are_switched_off(tmp_path: Path) -> None:
    made = byte_level()
    made.enable_truncation(max_length=2)
    made.enable_padding(length=64)
    made.save(str(tmp_path / "t.json"))
    tokenizer = Tokenizer(tmp_path / "t.json")
    assert tokenizer.decode(tokenizer.encode("a long text", add_special_tokens=True)) == "a long text"


def test_a_normalizer_that_strips_is_part_of_the_tokenizer(tmp_path: Path) -> None:
    made = byte_level()
    made.normalizer = normalizers.Strip()
    made.save(str(tmp_path / "t.json"))
    tokenizer = Tokenizer(tmp_path / "t.json")
    assert tokenizer.decode(tokenizer.encode(" a ", add_special_tokens=False)) == "a"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "isn't text"),
        (b"bytes", "isn't text"),
        (["a"], "isn't text"),
        ("a\ud800", "unpaired surrogate"),
    ],
)
def test_what_is_not_text_is_refused(text: Any, words: str) -> None:
    with pytest.raises(PromptError, match=words):
        load("byte level").encode(text, add_special_tokens=False)


@pytest.mark.parametrize("bad", [-1, 2**32, "a", None, 1.5])
@pytest.mark.parametrize("kind", ["byte level", "gemma"])
def test_what_cannot_be_an_id_is_refused(kind: str, bad: Any) -> None:
    with pytest.raises(PromptError, match="a token id can't be decoded"):
        load(kind).decode([bad])
    with pytest.raises(PromptError, match="a token id can't be decoded"):
        load(kind).incremental().push(bad)


def valid_file() -> bytes:
    return byte_level().to_str().encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b"not json",
        b"\xff\xfe",
        b"[" * 100_000,
        valid_file()[:-100],
        valid_file().replace(b'"ByteLevel"', b'"NoSuchThing"'),
    ],
    ids=["empty", "no keys", "list", "text", "binary", "deep", "cut off", "unknown parts"],
)
def test_a_broken_file_is_an_integrity_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(IntegrityError) as caught:
        Tokenizer(path)
    assert "tokenizer.json can't be loaded" in str(caught.value)
    assert "what to do: " in str(caught.value)


def test_a_missing_file_is_an_integrity_error(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="can't be loaded"):
        Tokenizer(tmp_path / "absent.json")
