from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_rt.backends.scripted import ScriptedBackend, follow
from dflash_rt.bundle.folder import Bundle, hash_file
from dflash_rt.errors import (
    BackendError,
    BackendUnavailableError,
    BundleError,
    ChatTemplateError,
    ContextLengthError,
    DFlashError,
    IntegrityError,
    PromptError,
    RequestError,
    SamplingError,
)
from dflash_rt.generator import Generator
from dflash_rt.sampling.params import SamplingParams
from dflash_rt.stream import Chunk
from tests.rt.bundle_maker import manifest_document, write_bundle
from tests.rt.scripted_generator import (
    BEGIN,
    END,
    TEMPLATE,
    VOCAB,
    encode,
    limits,
    mostly_right,
    prompts,
    scripted_generator,
    write_byte_tokenizer,
)

ANSWER = "Rayleigh scattering: é, €, 🙂.\n\nAsk more."
IDS = encode(ANSWER)


# Results


@pytest.mark.parametrize("speculative", [True, False])
def test_generate(speculative: bool) -> None:
    with scripted_generator(ANSWER) as generator:
        result = generator.generate([1], speculative=speculative)
    assert result.text == ANSWER
    assert result.token_ids == (*IDS, END)  # the stop token counts as a token and has no text
    assert result.finish_reason == "stop"
    assert result.stats.prompt_tokens == 1
    assert result.stats.new_tokens == len(IDS) + 1
    assert result.stats.num_draft_tokens == (4 if speculative else 0)


def test_stream_gives_the_same_in_chunks() -> None:
    with scripted_generator(ANSWER) as generator:
        whole = generator.generate([1])
        stream = generator.stream([1])
        chunks = list(stream)
    assert stream.result.text == whole.text == "".join(chunk.text for chunk in chunks)
    assert stream.result.token_ids == whole.token_ids == tuple(t for c in chunks for t in c.token_ids)
    assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert len(chunks) == whole.stats.steps + 1  # the first is the prefill's
    assert all(chunk.token_ids for chunk in chunks)


def test_a_chunk_tells_what_was_drafted() -> None:
    with scripted_generator(
        [10, 11, 12, 13, 14, 15, 16, 17], drafter=lambda prefix, count: [11, 12, 0, 0]
    ) as generator:
        chunks = list(generator.stream([1], max_new_tokens=5))
    assert [(c.token_ids, c.drafted) for c in chunks] == [((10,), 0), ((11, 12, 13), 2), ((14,), 0)]


def test_never_half_a_character() -> None:
    with scripted_generator(ANSWER) as generator:
        for speculative in (True, False):
            pieces = [chunk.text for chunk in generator.stream([1], speculative=speculative)]
            assert "".join(pieces) == ANSWER
            if not speculative:  # one byte a chunk: the emoji's first three bytes have no text yet
                first = len("Rayleigh scattering: é, €, ".encode())
                assert pieces[first : first + 4] == ["", "", "", "🙂"]


def test_a_character_cut_by_the_length_limit_is_marked() -> None:
    with scripted_generator("ab€") as generator:
        result = generator.generate([1], max_new_tokens=4)
    assert result.text == "ab\ufffd"
    assert result.finish_reason == "length"


def test_length_limit() -> None:
    with scripted_generator(ANSWER) as generator:
        for limit in range(1, 12):
            result = generator.generate([1], max_new_tokens=limit)
            assert (result.token_ids, result.finish_reason) == (tuple(IDS[:limit]), "length")


def test_without_max_new_tokens_the_limit_of_the_bundle_holds() -> None:
    with scripted_generator("x" * 100, max_seq_len=30) as generator:
        result = generator.generate([1])
    assert (len(result.token_ids), result.finish_reason) == (29, "length")


def test_prompt_may_fill_all_but_one() -> None:
    prompt = encode("p" * 29)
    with scripted_generator("xyz", prompt=prompt, max_seq_len=30) as generator:
        assert generator.generate(prompt).text == "x"


def test_stop_token_ids() -> None:
    with scripted_generator("abcabc" + "d" * 20, max_seq_len=20) as generator:
        b, c = encode("bc")
        assert generator.generate([1], stop_token_ids=[c, b]).text == "ab"  # ordinary tokens have text
        assert generator.generate([1], stop_token_ids=np.array([c])).token_ids == tuple(encode("abc"))
    with scripted_generator([END, END, 5]) as generator:
        assert generator.generate([1]).token_ids == (END,)  # the first token
        assert generator.generate([1], stop_token_ids=[], max_new_tokens=3).token_ids == (END, END, 5)


# Stop strings


def stopped_text(answer: str, stops: list[str]) -> tuple[str, int]:
    """Text and number of tokens by definition: those of the first tokens whose text has a stop string."""
    data = answer.encode()
    for count in range(1, len(data) + 1):
        text = data[:count].decode(errors="ignore")
        ends = [stop for stop in stops if text.endswith(stop)]
        if ends:
            return text[: -len(max(ends, key=len))], count
    return answer, len(data) + 1


@settings(deadline=None, max_examples=150)
@given(
    answer=st.text(alphabet="ab\n€", max_size=24),
    stops=st.lists(st.text(alphabet="ab\n€", min_size=1, max_size=4), max_size=3),
    width=st.integers(1, 6),
    wrong_every=st.integers(1, 5),
)
def test_stop_strings_anywhere(answer: str, stops: list[str], width: int, wrong_every: int) -> None:
    ids = encode(answer)
    generator = scripted_generator(
        ids, block_size=6, num_draft_tokens=width - 1, drafter=mostly_right([1], ids, wrong_every=wrong_every)
    )
    text, count = stopped_text(answer, stops)
    for speculative in (True, False):
        stream = generator.stream([1], stop=stops, speculative=speculative)
        chunks = list(stream)
        result = stream.result
        assert result.text == text == "".join(chunk.text for chunk in chunks)
        assert result.token_ids == (*ids, END)[:count]
        assert result.finish_reason == chunks[-1].finish_reason == "stop"


def test_stop_string_over_two_chunks_is_never_emitted() -> None:
    with scripted_generator(
        "one\n\ntwo", drafter=lambda prefix, count: [0] * count
    ) as generator:  # one token a chunk
        chunks = list(generator.stream([1], stop="\n\n"))
    assert [chunk.text for chunk in chunks] == ["o", "n", "e", "", ""]
    assert chunks[-1].token_ids == tuple(encode("\n"))


def test_stop_string_in_an_accepted_block_cuts_its_tokens() -> None:
    with scripted_generator(
        "abcdefgh", drafter=lambda prefix, count: encode("abcdefgh\n\n\n")[len(prefix) - 1 :][:count]
    ) as generator:
        stream = generator.stream([1], stop=["zz", "cd"])
        chunks = list(stream)
    assert [(chunk.text, chunk.drafted) for chunk in chunks] == [("a", 0), ("b", 3)]
    assert stream.result.token_ids == tuple(encode("abcd"))
    assert stream.result.stats.accepted_per_step == (4,)
    assert stream.result.stats.new_tokens == 4


def test_text_held_for_a_stop_string_comes_at_the_end() -> None:
    with scripted_generator("ab<en") as generator:
        assert generator.generate([1], stop=["<end>"]).text == "ab<en"
        assert generator.generate([1], stop=["<end>"], max_new_tokens=4).text == "ab<e"


def test_stop_string_in_the_text_that_only_the_end_makes_certain() -> None:
    with scripted_generator("ab€") as generator:
        result = generator.generate([1], stop=["\ufffd"], max_new_tokens=3)
    assert (result.text, result.finish_reason) == ("ab", "stop")


def test_stop_string_wins_over_length_on_the_last_token() -> None:
    with scripted_generator("abcd") as generator:
        result = generator.generate([1], stop=["bc"], max_new_tokens=3)
    assert (result.text, result.finish_reason, len(result.token_ids)) == ("a", "stop", 3)


# Prompts


def test_text_and_chat_prompts() -> None:
    generator = scripted_generator("x")
    assert generator.encode("hi") == [BEGIN, *encode("hi")]
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    assert generator.encode(chat) == encode("user: hi\nassistant: yo\n>")
    assert generator.encode(tuple(chat), chat_template_kwargs={"mood": "!"}) == encode(
        "user: hi!\nassistant: yo!\n>"
    )
    assert generator.encode(np.array([3, 4], dtype=np.uint16)) == [3, 4]
    assert generator.encode((np.int64(3), 4)) == [3, 4]


def test_prompt_texts_are_what_the_backend_gets() -> None:
    prompt = [BEGIN, *encode("Why is the sky blue?")]  # three prefill chunks
    with scripted_generator(ANSWER, prompt=prompt) as generator:
        assert generator.generate("Why is the sky blue?").text == ANSWER
    chat = encode("user: hi :)\n>")
    with scripted_generator(ANSWER, prompt=chat) as generator:
        message = {"role": "user", "content": "hi"}
        assert generator.generate([message], chat_template_kwargs={"mood": " :)"}).text == ANSWER


def test_the_caller_s_objects_stay_as_they_are() -> None:
    ids, stops, stop_ids = [1], ["zz"], [7]
    chat, kwargs = [{"role": "user", "content": "hi"}], {"mood": "!"}
    generator = scripted_generator("x", prompt=encode("user: hi!\n>"))
    generator.generate(
        chat, stop=stops, stop_token_ids=stop_ids, chat_template_kwargs=kwargs, max_new_tokens=2
    )
    scripted_generator("x").generate(ids)
    assert (ids, stops, stop_ids) == ([1], ["zz"], [7])
    assert (chat, kwargs) == ([{"role": "user", "content": "hi"}], {"mood": "!"})


def test_without_a_tokenizer_ids_work_and_text_is_empty() -> None:
    backend = ScriptedBackend(follow([1, 2, 3, 4, END]), block_size=5)
    with Generator.from_parts(limits(), backend) as generator:
        result = generator.generate([1, 2])
    assert result.token_ids == (3, 4, END)
    assert result.text == ""


# Statistics


def test_stats() -> None:
    rights = iter([0, 4, 2, 4, 4])
    answer = list(range(2, 100))

    def drafter(prefix: tuple[int, ...], count: int) -> list[int]:
        right = next(rights)
        return [answer[len(prefix) - 1 + i] if i < right else 0 for i in range(count)]

    with scripted_generator(answer, drafter=drafter) as generator:
        stats = generator.generate([1], max_new_tokens=14).stats
    assert stats.accepted_per_step == (0, 4, 2, 4)  # 1 + 1 + 5 + 3 + 4 of 5: the limit cut the last one
    assert stats.accepted_by_position == (3, 3, 2, 2)
    assert stats.steps == 4
    assert stats.tokens_per_step == 13 / 4
    assert list(stats.stage_seconds) == ["step"]
    assert 0.0 < stats.backend_seconds == stats.stage_seconds["step"] <= stats.decode_seconds
    assert stats.prefill_seconds > 0.0
    assert stats.tokens_per_second == 13 / stats.decode_seconds
    as_json = json.loads(json.dumps(stats.as_dict()))
    assert as_json["accepted_by_position"] == [3, 3, 2, 2]
    assert as_json["tokens_per_step"] == stats.tokens_per_step
    assert set(as_json) == {name for name in dir(stats) if not name.startswith("_") and name != "as_dict"}


def test_stats_without_a_step_and_without_drafts() -> None:
    with scripted_generator(ANSWER) as generator:
        one = generator.generate([1], max_new_tokens=1).stats
        plain = generator.generate([1], max_new_tokens=4, speculative=False).stats
    assert (one.steps, one.tokens_per_step, one.tokens_per_second, one.backend_seconds) == (0, 0.0, 0.0, 0.0)
    assert one.accepted_by_position == (0, 0, 0, 0)
    assert (plain.accepted_per_step, plain.accepted_by_position, plain.tokens_per_step) == (
        (0, 0, 0),
        (),
        1.0,
    )


def test_clocks_stand_still_between_chunks() -> None:
    with scripted_generator(ANSWER) as generator:
        began, slept = time.perf_counter(), 0.0
        stream = generator.stream([1], max_new_tokens=6)
        for _ in stream:
            time.sleep(0.01)
            slept += 0.01
        seconds = time.perf_counter() - began
    assert stream.result.stats.prefill_seconds + stream.result.stats.decode_seconds <= seconds - slept


def test_clocks_of_one_request_leave_out_the_others() -> None:
    with scripted_generator(ANSWER) as generator:
        generator.generate([1])
        result = generator.generate([1], max_new_tokens=2)
    assert result.stats.backend_seconds <= result.stats.decode_seconds


# From a bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    document = manifest_document()
    document["target"]["vocab_size"] = document["drafter"]["vocab_size"] = VOCAB
    for graph in document["graphs"].values():
        for tensor in (*graph["inputs"], *graph["outputs"]):
            tensor["shape"] = [
                VOCAB if tensor["name"] == "logits" and d == 32 else d for d in tensor["shape"]
            ]
    document["generation"]["chat_template_kwargs"] = {"mood": "!"}
    folder = write_bundle(tmp_path / "bundle", document)
    write_byte_tokenizer(folder / "tokenizer.json")
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    for name in ("tokenizer.json", "chat_template.jinja"):
        record = hash_file(folder / name)
        document["files"][name] = {"size": record.size, "sha256": record.sha256}
    (folder / "manifest.json").write_text(json.dumps(document), encoding="utf-8")
    return folder


@pytest.mark.parametrize("opened", [False, True])
def test_changed_files_are_found_on_request(bundle: Path, opened: bool) -> None:
    weights = bundle / "data" / "weights.bin"
    weights.write_bytes(weights.read_bytes().swapcase())
    given_bundle = Bundle.open(bundle) if opened else bundle

    def backend() -> ScriptedBackend:
        return ScriptedBackend(follow([1, 2, 0, 0]), block_size=4, prefill_chunk=8, max_rows=64)

    Generator(given_bundle, backend()).close()
    with pytest.raises(IntegrityError, match=r"data/weights\.bin: found sha256"):
        Generator(given_bundle, backend(), verify_files=True)


@pytest.mark.parametrize("opened", [False, True])
def test_from_a_bundle(bundle: Path, opened: bool) -> None:
    chat = encode("user: hi!\n>")
    backend = ScriptedBackend(
        follow([*chat, *encode("yes"), 2, 0, 0, 0]), block_size=4, prefill_chunk=8, max_rows=64
    )
    with Generator(Bundle.open(bundle) if opened else bundle, backend, verify_files=True) as generator:
        assert generator.limits.num_draft_tokens == 2
        assert generator.limits.max_seq_len == 64
        message = {"role": "user", "content": "hi"}
        result = generator.generate([message])
        other = generator.encode([message], chat_template_kwargs={"mood": "?"})
    assert other == encode("user: hi?\n>")
    assert result.token_ids == (*encode("yes"), 2)
    assert result.finish_reason == "stop"
    assert result.stats.num_draft_tokens == 2
    assert backend.closed


def test_bundle_without_a_tokenizer(bundle: Path) -> None:
    document = json.loads((bundle / "manifest.json").read_text())
    document["tokenizer"] = None
    for name in ("tokenizer.json", "chat_template.jinja"):
        del document["files"][name]
    (bundle / "manifest.json").write_text(json.dumps(document))
    with Generator(bundle, ScriptedBackend(follow([1, 5, 2]), block_size=4)) as generator:
        assert generator.generate([1]).token_ids == (5, 2)
        with pytest.raises(PromptError, match="no tokenizer"):
            generator.generate("text")


@pytest.mark.parametrize("drafts", [0, 3])
def test_num_draft_tokens_option(bundle: Path, drafts: int) -> None:
    backend = ScriptedBackend(follow(range(64)), block_size=4)
    with Generator(bundle, backend, num_draft_tokens=drafts) as generator:
        stats = generator.generate([0], max_new_tokens=9, stop_token_ids=[]).stats
    assert stats.num_draft_tokens == drafts
    assert stats.tokens_per_step == drafts + 1


BAD_CONSTRUCTIONS: dict[str, tuple[dict[str, Any], type[DFlashError], str]] = {
    "unknown backend": (
        {"backend": "cuda"},
        BackendUnavailableError,
        "found: 'cuda'\n  expected: one of onnxruntime",
    ),
    "empty backend name": ({"backend": ""}, BackendUnavailableError, "unknown backend"),
    "no backend": ({"backend": None}, BackendError, "found: NoneType"),
    "a class as backend": ({"backend": dict}, BackendError, "this isn't a backend"),
    "no threads": ({"threads": 0}, RequestError, "threads is wrong"),
    "threads as text": ({"threads": "2"}, RequestError, r"found: '2' \(str\)"),
    "threads of a ready backend": ({"threads": 2}, RequestError, "threads has no effect"),
    "drafts over the block": ({"num_draft_tokens": 4}, RequestError, "found: 4\n  expected: 0 to 3"),
    "drafts below 0": ({"num_draft_tokens": -1}, RequestError, "num_draft_tokens is wrong"),
    "drafts True": ({"num_draft_tokens": True}, RequestError, "num_draft_tokens is wrong"),
    "a number as bundle": ({"bundle": 5}, BundleError, "found: int"),
    "no bundle there": ({"bundle": "no/such/folder"}, BundleError, "no/such/folder"),
}


@pytest.mark.parametrize("name", BAD_CONSTRUCTIONS)
def test_bad_constructions(bundle: Path, name: str) -> None:
    changes, error, message = BAD_CONSTRUCTIONS[name]
    arguments = {"bundle": bundle, "backend": ScriptedBackend(follow([0])), **changes}
    with pytest.raises(error, match=message):
        Generator(**arguments)


# Bad requests

CHAT = [{"role": "user", "content": "hi"}]
BAD_REQUESTS: dict[str, tuple[object, dict[str, Any], type[DFlashError], str]] = {
    "no ids": ([], {}, PromptError, "the prompt is empty"),
    "no ids in an array": (np.array([], dtype=np.int64), {}, PromptError, "the prompt is empty"),
    "None": (None, {}, PromptError, "prompt has a wrong type\n  found: NoneType"),
    "bytes": (b"hi", {}, PromptError, "prompt has a wrong type\n  found: bytes"),
    "one number": (5, {}, PromptError, "prompt has a wrong type\n  found: int"),
    "one message": (CHAT[0], {}, PromptError, "prompt has a wrong type\n  found: dict"),
    "a generator": ((i for i in (1, 2)), {}, PromptError, "prompt has a wrong type\n  found: generator"),
    "floats": ([1.0], {}, PromptError, r"at position 0 .*\n.*found: 1.0 \(float\)"),
    "booleans": ([1, True], {}, PromptError, r"at position 1 .*\n.*found: True \(bool\)"),
    "texts": (["a", "b"], {}, PromptError, r"found: 'a' \(str\)"),
    "ids and a message": ([1, CHAT[0]], {}, PromptError, "at position 1 that isn't a token id"),
    "a message and an id": ([CHAT[0], 1], {}, PromptError, "message 1 isn't a message"),
    "two axes": (np.array([[1, 2]]), {}, PromptError, r"found: an array int64 \[1, 2\]"),
    "array of floats": (np.array([1.0]), {}, PromptError, "found: an array float64"),
    "array of booleans": (np.array([True]), {}, PromptError, "found: an array bool"),
    "negative id": ([3, -1], {}, PromptError, "position 1 that is outside the vocabulary\n  found: -1"),
    "id too large": ([VOCAB], {}, PromptError, f"found: {VOCAB}\n  expected: 0 to {VOCAB - 1}"),
    "id beyond int64": ([2**70], {}, PromptError, "outside the vocabulary"),
    "message without role": ([{"content": "hi"}], {}, PromptError, "message 0 has no role"),
    "reserved template variable": (
        CHAT,
        {"chat_template_kwargs": {"messages": []}},
        ChatTemplateError,
        "messages",
    ),
    "template kwargs without a chat": (
        "hi",
        {"chat_template_kwargs": {}},
        RequestError,
        "a prompt that is no chat",
    ),
    "template kwargs as a list": (CHAT, {"chat_template_kwargs": ["mood"]}, RequestError, "expected: a dict"),
    "prompt as long as the limit": (
        [1] * 200,
        {},
        ContextLengthError,
        r"200 .* \+ max_new_tokens 1 = 201\n.* 200\n",
    ),
    "one token over the limit": (
        [1] * 20,
        {"max_new_tokens": 181},
        ContextLengthError,
        r"found: 20 prompt .* 181 = 201\n  expected: .* max_seq_len 200\n.*pass at most max_new_tokens=180",
    ),
    "no new tokens": ([1], {"max_new_tokens": 0}, RequestError, r"max_new_tokens is wrong\n  found: 0"),
    "negative new tokens": ([1], {"max_new_tokens": -1}, RequestError, "max_new_tokens is wrong"),
    "max_new_tokens True": ([1], {"max_new_tokens": True}, RequestError, r"found: True \(bool\)"),
    "max_new_tokens 1.0": ([1], {"max_new_tokens": 1.0}, RequestError, r"found: 1.0 \(float\)"),
    "empty stop string": ([1], {"stop": ["a", ""]}, RequestError, "stop strings"),
    "empty stop": ([1], {"stop": ""}, RequestError, "stop strings"),
    "ids as stop": ([1], {"stop": [7]}, RequestError, "stop strings"),
    "stop None": ([1], {"stop": None}, RequestError, "stop strings"),
    "a set of stops": ([1], {"stop": {"a"}}, RequestError, "stop strings"),
    "stop id outside": (
        [1],
        {"stop_token_ids": [VOCAB]},
        RequestError,
        "stop_token_ids has a token id at position 0",
    ),
    "one stop id": ([1], {"stop_token_ids": 5}, RequestError, "stop_token_ids can't be read as token ids"),
    "text as stop id": ([1], {"stop_token_ids": "</s>"}, RequestError, "stop_token_ids can't be read"),
    "sampling as dict": ([1], {"sampling": {"temperature": 0}}, SamplingError, "found: dict"),
    "sampling as number": ([1], {"sampling": 0.0}, SamplingError, "found: float"),
    "speculative as text": ([1], {"speculative": "no"}, RequestError, r"speculative is wrong\n  found: 'no'"),
    "speculative None": ([1], {"speculative": None}, RequestError, "expected: True or False"),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_bad_requests_are_refused_before_any_work(name: str) -> None:
    prompt, arguments, error, message = BAD_REQUESTS[name]
    generator = scripted_generator(ANSWER)
    for call in (generator.stream, generator.generate):
        with pytest.raises(error, match=message) as caught:
            call(prompt, **arguments)  # type: ignore[arg-type]
        assert type(caught.value) is error
        assert isinstance(caught.value, RequestError)
        assert "what to do" in str(caught.value)
    assert generator._backend.calls == 0  # type: ignore[attr-defined]
    assert generator.generate([1]).text == ANSWER


def test_empty_text_is_empty_only_if_it_has_no_tokens() -> None:
    assert scripted_generator("x").encode("") == [BEGIN]
    assert scripted_generator("x", prompt=[BEGIN]).generate("").text == "x"


@pytest.mark.parametrize("prompt", ["hi", CHAT])
def test_text_needs_a_tokenizer(prompt: Any) -> None:
    generator = Generator.from_parts(limits(), ScriptedBackend(follow([0])))
    with pytest.raises(PromptError, match="the bundle has no tokenizer"):
        generator.stream(prompt)
    with pytest.raises(PromptError, match="stop strings need a tokenizer"):
        generator.stream([1], stop=["a"])


def test_a_chat_needs_a_template() -> None:
    generator = Generator.from_parts(limits(), ScriptedBackend(follow([0])), prompts(chat_template=None))
    with pytest.raises(ChatTemplateError, match="no chat template"):
        generator.stream(CHAT)


@pytest.mark.parametrize("name", ["typical_p", "n", "max_tokens"])
def test_unknown_arguments(name: str) -> None:
    generator = scripted_generator(ANSWER)
    for call in (generator.generate, generator.stream, SamplingParams):
        arguments: tuple[Any, ...] = () if call is SamplingParams else ([1],)
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            call(*arguments, **{name: 1})  # type: ignore[operator]


@pytest.mark.parametrize("value", [0, 0.0, -0.0, np.float32(0)])
def test_sampling_greedy(value: Any) -> None:
    assert scripted_generator(ANSWER).generate([1], sampling=SamplingParams(temperature=value)).text == ANSWER


def test_results_can_t_be_changed() -> None:
    result = scripted_generator(ANSWER).generate([1])
    for thing, name in ((result, "text"), (result.stats, "new_tokens"), (Chunk("", (1,), 0, None), "text")):
        with pytest.raises(AttributeError):
            setattr(thing, name, "other")
