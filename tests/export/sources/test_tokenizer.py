"""The target's tokenizer: what is copied, converted and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dflash_export.errors import CheckpointError, SourceError
from dflash_export.sources.resolve import Source, resolve_target
from dflash_export.sources.tokenizer import export_tokenizer
from dflash_export.targets.config import (
    load_target_config,
    stop_token_ids,
    target_facts,
)
from tests.checkpoints import (
    SMOLLM2,
    byte_tokenizer,
    check_message,
    edit_json,
    save_target,
)

TEXTS = [
    "Why is the sky blue?",
    "  two  spaces, tabs\tand\n\nnewlines ",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "naïve café, 12345.67, a_b-c/d, don't",
    "日本語と 🤖🇩🇪 and \u200b zero width",
    "def f(x):\n    return x**2  # comment",
    "<|endoftext|>",
    "",
    "x" * 300,
]


# --- Tokenizers ---


def save_tokenizer(folder: Path, **settings: Any) -> Tokenizer:
    tokenizer = byte_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    if settings:
        edit_json(folder / "tokenizer_config.json", **settings)
    return tokenizer


@pytest.fixture
def target(tmp_path: Path) -> Source:
    return resolve_target(save_target(tmp_path / "target"))


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    (tmp_path / "bundle").mkdir()
    return tmp_path / "bundle"


def test_smollm2(bundle: Path) -> None:
    source = resolve_target(SMOLLM2)
    config = load_target_config(source)
    facts = target_facts(config)
    assert (facts.num_layers, facts.hidden_size, facts.head_dim, facts.tie_word_embeddings) == (
        30,
        576,
        64,
        True,
    )
    files = export_tokenizer(source, bundle)
    assert files is not None
    assert (files.spec.bos_token, files.spec.eos_token, files.size) == ("<|im_start|>", "<|im_end|>", 49152)
    written = Tokenizer.from_file(str(bundle / files.spec.path))
    assert [written.id_to_token(token) for token in stop_token_ids(source, config)] == ["<|im_end|>"]
    theirs = AutoTokenizer.from_pretrained(SMOLLM2.parent, gguf_file=SMOLLM2.name)
    for text in TEXTS:
        assert written.encode(text, add_special_tokens=True).ids == theirs(text)["input_ids"], text
        ids = written.encode(text, add_special_tokens=False).ids
        for skip in (True, False):
            assert written.decode(ids, skip_special_tokens=skip) == theirs.decode(
                ids, skip_special_tokens=skip
            )
    assert files.spec.chat_template == "chat_template.jinja"
    template = (bundle / "chat_template.jinja").read_bytes().decode()
    assert template == files.chat_template == theirs.chat_template
    assert "<|im_start|>" in template


def test_copied_tokenizer_is_the_one_of_transformers(target: Source, bundle: Path) -> None:
    fast = PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer(), bos_token="<|im_start|>", eos_token="<|im_end|>"
    )
    fast.chat_template = "{{ messages }}\r\n\n"
    fast.save_pretrained(target.path)
    files = export_tokenizer(target, bundle)
    assert files is not None
    assert (bundle / "tokenizer.json").read_bytes() == (target.path / "tokenizer.json").read_bytes()
    assert (files.spec.bos_token, files.spec.eos_token, files.size) == ("<|im_start|>", "<|im_end|>", 258)
    assert files.chat_template == "{{ messages }}\r\n\n"
    assert (bundle / "chat_template.jinja").read_bytes() == b"{{ messages }}\r\n\n"
    theirs = AutoTokenizer.from_pretrained(target.path)
    written = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    for text in TEXTS:
        assert written.encode(text).ids == theirs(text)["input_ids"]


def test_no_tokenizer(target: Source, bundle: Path) -> None:
    assert export_tokenizer(target, bundle) is None
    assert list(bundle.iterdir()) == []


def test_tokenizer_alone(target: Source, bundle: Path) -> None:
    save_tokenizer(target.path)
    files = export_tokenizer(target, bundle)
    assert files is not None
    assert (files.spec.bos_token, files.spec.eos_token, files.chat_template, files.spec.chat_template) == (
        None,
    ) * 4
    assert [path.name for path in bundle.iterdir()] == ["tokenizer.json"]


@pytest.mark.parametrize("value", ["<s>", {"content": "<s>", "lstrip": False, "__type": "AddedToken"}])
def test_special_tokens(target: Source, bundle: Path, value: object) -> None:
    save_tokenizer(target.path, bos_token=value, eos_token=None)
    edit_json(target.path / "special_tokens_map.json", bos_token="<old>", eos_token="<old>")
    files = export_tokenizer(target, bundle)
    assert files is not None
    assert (files.spec.bos_token, files.spec.eos_token) == ("<s>", None)


def test_older_special_tokens_map(target: Source, bundle: Path) -> None:
    save_tokenizer(target.path)
    edit_json(target.path / "special_tokens_map.json", eos_token={"content": "</s>"})
    files = export_tokenizer(target, bundle)
    assert files is not None
    assert files.spec.eos_token == "</s>"


@pytest.mark.parametrize("value", [3, ["<s>"], {"content": 3}])
def test_wrong_special_token(target: Source, bundle: Path, value: object) -> None:
    save_tokenizer(target.path, bos_token=value)
    with pytest.raises(CheckpointError, match="bos_token in tokenizer_config") as caught:
        export_tokenizer(target, bundle)
    check_message(caught, "download the file again")


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("plain", "plain"),
        ([{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}], "D"),
        ({"default": "D", "rag": "R"}, "D"),
        (None, None),
    ],
)
def test_chat_template_setting(target: Source, bundle: Path, setting: object, expected: str | None) -> None:
    save_tokenizer(target.path, chat_template=setting)
    files = export_tokenizer(target, bundle)
    assert files is not None
    assert files.chat_template == expected
    # A file of its own wins.
    (target.path / "chat_template.jinja").write_text("file ü", encoding="utf-8")
    files = export_tokenizer(target, bundle)
    assert files is not None
    assert files.chat_template == "file ü"


def test_chat_template_json(target: Source, bundle: Path) -> None:
    save_tokenizer(target.path)
    edit_json(target.path / "chat_template.json", chat_template="J")
    files = export_tokenizer(target, bundle)
    assert files is not None
    assert files.chat_template == "J"


@pytest.mark.parametrize("setting", [[{"name": "tool_use", "template": "T"}], [], {"rag": "R"}, 3, ["x"]])
def test_no_default_chat_template(target: Source, bundle: Path, setting: object) -> None:
    save_tokenizer(target.path, chat_template=setting)
    with pytest.raises(SourceError, match="no default chat template") as caught:
        export_tokenizer(target, bundle)
    check_message(caught, "chat_template.jinja")


def test_chat_template_that_is_not_text(target: Source, bundle: Path) -> None:
    save_tokenizer(target.path)
    (target.path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="not UTF-8") as caught:
        export_tokenizer(target, bundle)
    check_message(caught, "download the file again")


@pytest.mark.parametrize("text", ["", "{}", '{"model": {"type": "Nothing"}}'])
def test_damaged_tokenizer(target: Source, bundle: Path, text: str) -> None:
    (target.path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json can't be used") as caught:
        export_tokenizer(target, bundle)
    check_message(caught, "download the file again")


def test_sentencepiece_that_cannot_be_converted(target: Source, bundle: Path) -> None:
    (target.path / "tokenizer.model").write_bytes(b"not a model")
    edit_json(target.path / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    with pytest.raises(SourceError, match="can't be converted") as caught:
        export_tokenizer(target, bundle)
    check_message(caught, "save_pretrained", "install the package")


def test_vocabulary_and_merges_are_converted(target: Source, bundle: Path) -> None:
    byte_tokenizer().model.save(str(target.path))
    edit_json(target.path / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer", eos_token="<|im_end|>")
    vocabulary = json.loads((target.path / "vocab.json").read_text())
    assert len(vocabulary) == 256
    files = export_tokenizer(target, bundle)
    assert files is not None
    assert files.spec.eos_token == "<|im_end|>"
    theirs = AutoTokenizer.from_pretrained(target.path)
    written = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    for text in TEXTS:
        assert written.encode(text).ids == theirs(text)["input_ids"]
