"""Writing a target's tokenizer into a bundle: ``tokenizer.json`` and ``chat_template.jinja``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dflash_export.errors import SourceError
from dflash_export.sources.files import damaged, is_file, read_bytes, read_json
from dflash_export.sources.resolve import Source
from dflash_rt.bundle.manifest import TokenizerSpec
from dflash_rt.text.prompts import PromptEncoder
from dflash_rt.text.tokenizer import Tokenizer

__all__ = ["TokenizerFiles", "export_tokenizer"]

TOKENIZER_FILE = "tokenizer.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
# Without tokenizer.json, any of these makes a tokenizer that transformers can convert.
_CONVERTIBLE = ("tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class TokenizerFiles:
    """What was written, and the text of the chat template.

    ``size`` is the highest token id plus 1; ids from there up to the model's ``vocab_size`` are padding.
    """

    spec: TokenizerSpec
    size: int
    chat_template: str | None

    def encoder(self, folder: Path, template_kwargs: Mapping[str, Any]) -> PromptEncoder:
        """Of the tokenizer that was written into ``folder``."""
        return PromptEncoder(
            tokenizer=Tokenizer(folder / self.spec.path),
            chat_template=self.chat_template,
            bos_token=self.spec.bos_token,
            eos_token=self.spec.eos_token,
            template_kwargs=template_kwargs,
        )


def export_tokenizer(source: Source, folder: Path) -> TokenizerFiles | None:
    """Write the tokenizer of ``source`` into the existing ``folder``; ``None`` when it has none.

    A ``tokenizer.json`` is copied byte for byte. From GGUF, and from the older formats, transformers makes
    one. Raises :class:`~dflash_export.errors.CheckpointError` for files that are malformed and
    :class:`~dflash_export.errors.SourceError` when a tokenizer can't be converted.
    """
    if source.kind == "gguf":
        return _from_transformers(source, folder, gguf_file=source.path.name)
    if is_file(source.path / TOKENIZER_FILE):
        # Read and written apart, so that an error says which of the two failed.
        content = read_bytes(source.path / TOKENIZER_FILE)
        (folder / TOKENIZER_FILE).write_bytes(content)
        settings = _settings(source.path)
        return _finish(
            folder,
            bos_token=_token_text(settings, "bos_token"),
            eos_token=_token_text(settings, "eos_token"),
            chat_template=_chat_template(source.path, settings),
        )
    if any(is_file(source.path / name) for name in _CONVERTIBLE):
        return _from_transformers(source, folder, local_files_only=True)
    return None


def _from_transformers(source: Source, folder: Path, **extra: Any) -> TokenizerFiles:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False, **extra)
        backend = tokenizer.backend_tokenizer
    # What is raised here depends on which optional package is missing and on what is wrong with the files.
    except Exception as error:
        raise SourceError(
            "the tokenizer can't be converted to tokenizer.json",
            found=f"{source.id}: {type(error).__name__}: {error}",
            expected=f"{TOKENIZER_FILE}, or files that transformers can convert",
            remedy=f"install the package that the error names, or put a {TOKENIZER_FILE} beside config.json "
            "(AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) writes one)",
        ) from error
    # Not its save(), which raises a bare Exception when the disk is full.
    (folder / TOKENIZER_FILE).write_text(backend.to_str(pretty=True), encoding="utf-8", newline="")
    template = tokenizer.chat_template
    return _finish(
        folder,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        chat_template=_pick_template(template, source.id) if template is not None else None,
    )


def _finish(
    folder: Path, *, bos_token: str | None, eos_token: str | None, chat_template: str | None
) -> TokenizerFiles:
    size = _tokenizer_size(folder / TOKENIZER_FILE)
    if chat_template is not None:
        (folder / CHAT_TEMPLATE_FILE).write_text(chat_template, encoding="utf-8", newline="")
    spec = TokenizerSpec(
        path=TOKENIZER_FILE,
        chat_template=None if chat_template is None else CHAT_TEMPLATE_FILE,
        bos_token=bos_token,
        eos_token=eos_token,
    )
    return TokenizerFiles(spec, size, chat_template)


def _tokenizer_size(path: Path) -> int:
    import tokenizers

    try:
        vocabulary = tokenizers.Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    # The tokenizers library raises bare Exception for a file that it can't parse.
    except Exception as error:
        raise damaged(
            f"{TOKENIZER_FILE} can't be used", error, "a file that the tokenizers library loads"
        ) from error
    return max(vocabulary.values(), default=-1) + 1


def _settings(folder: Path) -> dict[str, Any]:
    """``tokenizer_config.json`` over the older ``special_tokens_map.json``."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if is_file(folder / name):
            settings.update(read_json(folder / name))
    return settings


def _token_text(settings: Mapping[str, Any], name: str) -> str | None:
    value = settings.get(name)
    if isinstance(value, Mapping):
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        raise damaged(
            f"{name} in tokenizer_config.json is wrong",
            repr(settings.get(name)),
            "a string, an object with content, or null",
        )
    return value


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """A file of its own wins over the setting, as in transformers."""
    path = folder / CHAT_TEMPLATE_FILE
    if is_file(path):
        try:
            return read_bytes(path).decode("utf-8")
        except UnicodeDecodeError as error:
            raise damaged(f"{CHAT_TEMPLATE_FILE} is not UTF-8", error, "text in UTF-8") from error
    template = settings.get("chat_template")
    if template is None and is_file(folder / "chat_template.json"):
        template = read_json(folder / "chat_template.json").get("chat_template")
    return None if template is None else _pick_template(template, folder.name)


def _pick_template(template: object, owner: str) -> str:
    """The one that ``apply_chat_template`` uses when it is called without a name."""
    named = template
    if isinstance(template, list):
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, Mapping)}
    chosen = named.get("default") if isinstance(named, Mapping) else named
    if isinstance(chosen, str):
        return chosen
    names = sorted(map(str, named)) if isinstance(named, Mapping) else [type(template).__name__]
    raise SourceError(
        f"{owner} has no default chat template",
        found=", ".join(names),
        expected="one template, or several with one named default",
        remedy=f"write the one to use into {CHAT_TEMPLATE_FILE} beside config.json",
    )
