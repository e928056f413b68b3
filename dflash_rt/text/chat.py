"""Renders chat templates as transformers does, in a sandbox, since a bundle may come from anyone.

A template sees plain JSON data only (messages, keyword arguments, token strings). It can't reach Python's
internals, change its arguments or include files. It can still waste time and memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from dflash_rt.errors import ChatTemplateError, PromptError

if TYPE_CHECKING:
    import jinja2

__all__ = ["render"]

MAX_RENDERED_CHARACTERS = 2**24
_RESERVED = ("add_generation_prompt", "bos_token", "eos_token", "messages")
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")


def render(
    messages: Sequence[Mapping[str, Any]],
    template: str | None,
    *,
    bos_token: str | None = None,
    eos_token: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> str:
    """The prompt text of a chat, ending where the assistant answers. Encode it without special tokens.

    ``messages`` are dicts with ``role`` and ``content`` (text, or a list of text parts); other keys reach the
    template, too. ``kwargs`` are the template's own variables, such as ``enable_thinking`` or ``tools``.

    Raises:
        PromptError: no messages, or one that isn't as described.
        ChatTemplateError: there is no template, or it fails, also where the sandbox stops it.
    """
    if template is None:
        raise ChatTemplateError(
            "the bundle has no chat template",
            found="chat messages",
            expected="a str or token ids",
            remedy="pass a plain prompt, or export the target with its chat template",
        )
    variables = _variables(kwargs or {})
    variables |= {name: token for name, token in _tokens(bos_token, eos_token) if token is not None}
    variables["messages"] = _checked_messages(messages)
    import jinja2

    try:
        text = _bounded(_compile(template), variables)
    except jinja2.TemplateSyntaxError as error:
        raise _failed(f"line {error.lineno}: {error.message}", "valid Jinja") from error
    except Exception as error:  # a template may raise any exception
        found = f"{type(error).__name__}: {error}"[:500]
        raise _failed(found, "a template that renders these messages") from error
    _refuse_printed_parts(text, variables["messages"])
    return text


def _refuse_printed_parts(text: str, messages: Sequence[Mapping[str, Any]]) -> None:
    """Raise if a template that knows only strings has printed a list of parts as Python shows it."""
    for message in messages:
        parts = message["content"] if isinstance(message["content"], list) else []
        if any(repr(part) in text for part in parts):
            raise ChatTemplateError(
                "the chat template doesn't take content in parts",
                found="a list as content, which would appear in the prompt as Python prints it",
                expected="content: a string",
                remedy="join the parts of each message into one string",
            )


def _failed(found: str, expected: str) -> ChatTemplateError:
    return ChatTemplateError(
        "the chat template failed",
        found=found,
        expected=expected,
        remedy="check the messages and chat_template_kwargs against the template, or pass a plain prompt",
    )


def _tokens(bos_token: str | None, eos_token: str | None) -> tuple[tuple[str, str | None], ...]:
    # A token that the model lacks stays undefined: templates print it, and None would print as "None".
    return ("bos_token", bos_token), ("eos_token", eos_token)


def _variables(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The template's variables; ``tools`` and ``documents`` are always defined, as templates expect."""
    reserved = [name for name in _RESERVED if name in kwargs]
    if reserved:
        raise ChatTemplateError(
            "chat_template_kwargs has names that the renderer sets itself",
            found=", ".join(reserved),
            expected="other names than " + ", ".join(_RESERVED),
            remedy="leave these names out",
        )
    plain = _plain(kwargs, "chat_template_kwargs")
    return {"tools": None, "documents": None, "add_generation_prompt": True, **plain}


def _checked_messages(messages: object) -> list[dict[str, Any]]:
    """A plain copy of the messages. Raises PromptError."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise _bad("the chat isn't a list of messages", type(messages).__name__, "a list of dicts")
    if not messages:
        raise _bad("the chat is empty", "no messages", "at least one message")
    return [_checked_message(message, f"message {i}") for i, message in enumerate(messages)]


def _checked_message(message: object, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise _bad(f"{where} isn't a message", type(message).__name__, "a dict with role and content")
    plain: dict[str, Any] = _plain(message, where)
    if not isinstance(plain.get("role"), str) or not plain["role"]:
        raise _bad(f"{where} has no role", _shown(plain, "role"), "role: a string such as 'user'")
    content = plain.get("content")
    # An assistant message that only calls tools has no content.
    optional = "content" in plain and content is None and plain.get("tool_calls")
    parts_ok = isinstance(content, list) and all(_is_text_part(part) for part in content)
    if not (isinstance(content, str) or parts_ok or optional):
        expected = "content: a string, or a list of {'type': 'text', 'text': ...} and nothing else"
        raise _bad(f"{where} has no usable content", _shown(plain, "content"), expected)
    reasoning = next((plain[key] for key in _REASONING_KEYS if plain.get(key) is not None), None)
    if reasoning is None:
        return plain
    # As in transformers: templates read a message's reasoning under either name.
    return {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _is_text_part(part: object) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _shown(message: Mapping[str, Any], key: str) -> str:
    return f"{key}: {message[key]!r}"[:80] if key in message else f"no {key}"


def _bad(what: str, found: str, expected: str) -> PromptError:
    return PromptError(
        what, found=found, expected=expected, remedy='pass for example [{"role": "user", "content": "Hello"}]'
    )


def _plain(value: Any, where: str) -> Any:
    """A copy of plain JSON types. Other objects may have dangerous methods that the sandbox doesn't know."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping) and all(type(key) is str for key in value):
        return {key: _plain(item, where) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, where) for item in value]
    what = f"{where} holds a value that can't be given to a template"
    raise _bad(what, type(value).__name__, "plain JSON types only")


def _bounded(template: jinja2.Template, variables: Mapping[str, Any]) -> str:
    pieces = []
    size = 0
    for piece in template.generate(variables):
        pieces.append(piece)
        size += len(piece)
        if size > MAX_RENDERED_CHARACTERS:
            raise OverflowError(f"the template wrote more than {MAX_RENDERED_CHARACTERS} characters")
    return "".join(pieces)


@lru_cache(maxsize=8)
def _compile(source: str) -> jinja2.Template:
    from dflash_rt.text.chat_environment import ChatEnvironment

    return ChatEnvironment().from_string(source)
