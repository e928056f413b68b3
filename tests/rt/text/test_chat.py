from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from dflash_rt.errors import ChatTemplateError, PromptError
from dflash_rt.text.chat import render

Messages = list[dict[str, Any]]
HELLO: Messages = [{"role": "user", "content": "Hello"}]

# Written for these tests, each in the style of one family and using what that family's templates use.
LLAMA_3 = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

CHATML = """{% for message in messages %}
    {% if loop.first and message.role != 'system' %}
<|im_start|>system
You are helpful.<|im_end|>
    {% endif %}
<|im_start|>{{ message.role }}
    {% if message.content is string %}
{{ message.content }}<|im_end|>
    {% else %}
        {% for part in message.content %}
{{ part.text }}
        {% endfor %}
<|im_end|>
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""

QWEN_THINKING = """{%- set ns = namespace(last=messages | length - 1, multi_step=true) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if ns.multi_step and message.role == "user" %}
        {%- set ns.multi_step = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {%- set reasoning = message.reasoning_content if message.reasoning_content is defined else '' %}
        {%- if '</think>' in message.content %}
            {%- set reasoning = message.content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last %}{{- '<think>' + reasoning + '</think>' }}{%- endif %}
        {% generation %}{{- message.content }}{% endgeneration %}
        {{- '<|im_end|>\\n' }}
        {%- continue %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

MISTRAL = """{{ bos_token }}{% for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
    {{- raise_exception('roles must alternate user/assistant') }}
{%- endif %}
{%- if message['role'] == 'user' %}
    {{- '[INST] ' + message['content'] + ' [/INST]' }}
{%- else %}
    {%- if message.tool_calls is defined %}{{- message.tool_calls | tojson }}{% endif %}
    {{- ' ' ~ (message['content'] or '') ~ eos_token }}
{%- endif %}
{%- endfor %}"""

DATED = """{{ strftime_now('%d %b %Y') }}|{{ dict(a=1, b='<&>') | tojson }}|{{ dict.fromkeys('ab', 1) }}
{{ pad_token }}|{{ messages | length }}"""

CHATS: dict[str, Messages] = {
    "one": HELLO,
    "system": [
        {"role": "system", "content": "  Be brief. "},
        {"role": "user", "content": "Hi <b>&amp; 日本\n"},
    ],
    "turns": [
        {"role": "user", "content": "1+1?"},
        {
            "role": "assistant",
            "content": "<think>\nsum\n</think>2",
            "tool_calls": [{"name": "f", "x": "<é>"}],
        },
        {"role": "user", "content": "{{ 7 * 7 }} {% if %}"},
    ],
    "reasoning": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "thinking": "hm"}],
    "parts": [
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}
    ],
}
TEMPLATES = {
    "llama 3": LLAMA_3,
    "chatml": CHATML,
    "qwen": QWEN_THINKING,
    "mistral": MISTRAL,
    "dated": DATED,
}
TAKES_PARTS = ("chatml", "dated")


def reference(template: str, messages: Messages, **kwargs: Any) -> str:
    """What transformers renders."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"<s>": 0, "</s>": 1}, merges=[]))
    make: Any = PreTrainedTokenizerFast  # has no types
    tokenizer = make(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    text = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True, **kwargs
    )
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_rendering_is_that_of_transformers(name: str, chat: str) -> None:
    template, messages = TEMPLATES[name], CHATS[chat]
    if chat == "parts" and name not in TAKES_PARTS:
        with pytest.raises(ChatTemplateError, match="the chat template"):
            render(messages, template, bos_token="<s>", eos_token="</s>")
        return
    if name == "mistral" and chat == "system":
        with pytest.raises(ChatTemplateError, match="roles must alternate user/assistant"):
            render(messages, template, bos_token="<s>", eos_token="</s>")
        return
    assert render(messages, template, bos_token="<s>", eos_token="</s>") == reference(template, messages)


@pytest.mark.parametrize(
    "kwargs",
    [{"enable_thinking": False}, {"enable_thinking": True}, {"tools": [{"name": "f", "about": "<é>"}]}],
)
@pytest.mark.parametrize("name", ["llama 3", "qwen"])
def test_template_variables_reach_the_template(name: str, kwargs: dict[str, Any]) -> None:
    ours = render(HELLO, TEMPLATES[name], bos_token="<s>", eos_token="</s>", kwargs=kwargs)
    assert ours == reference(TEMPLATES[name], HELLO, **kwargs)


def test_exactly_this_text() -> None:
    messages = CHATS["turns"]
    assert render(messages, MISTRAL, bos_token="<s>", eos_token="</s>") == (
        '<s>[INST] 1+1? [/INST][{"name": "f", "x": "<é>"}] <think>\nsum\n</think>2</s>'
        "[INST] {{ 7 * 7 }} {% if %} [/INST]"
    )
    assert render(HELLO, QWEN_THINKING, kwargs={"enable_thinking": False}).endswith("<think>\n\n</think>\n\n")


def test_tokens_that_the_model_lacks_print_nothing() -> None:
    assert render(HELLO, "{{ bos_token }}{{ eos_token }}{{ bos_token is defined }}") == "False"
    assert render(HELLO, "{{ bos_token }}", bos_token="<s>") == "<s>"


def test_parts_never_end_up_in_the_prompt_as_python_prints_them() -> None:
    with pytest.raises(ChatTemplateError, match="doesn't take content in parts"):
        render(CHATS["parts"], LLAMA_3)


def test_the_callers_objects_are_not_changed() -> None:
    messages = copy.deepcopy(CHATS["turns"])
    kwargs = {"tools": [{"name": "f"}]}
    render(messages, LLAMA_3, kwargs=kwargs)
    assert messages == CHATS["turns"]
    assert kwargs == {"tools": [{"name": "f"}]}


def test_without_a_template() -> None:
    with pytest.raises(ChatTemplateError) as caught:
        render(HELLO, None)
    assert "no chat template" in str(caught.value)
    assert "what to do: " in str(caught.value)


# --- messages that aren't right -----------------------------------------------------------------------


class Evil(str):
    def run(self) -> str:
        return "ran"


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], ["the chat is empty"]),
        (None, ["isn't a list of messages", "NoneType"]),
        ("Hello", ["isn't a list of messages", "str"]),
        ({"role": "user", "content": "x"}, ["isn't a list of messages", "dict"]),
        (["Hello"], ["message 0 isn't a message", "str"]),
        ([*HELLO, None], ["message 1 isn't a message", "NoneType"]),
        ([{"content": "x"}], ["message 0 has no role", "no role"]),
        ([{"role": "", "content": "x"}], ["message 0 has no role", "role: ''"]),
        ([{"role": 1, "content": "x"}], ["message 0 has no role", "role: 1"]),
        ([{"role": "user"}], ["message 0 has no usable content", "no content"]),
        ([{"role": "user", "content": None}], ["no usable content", "content: None"]),
        ([{"role": "user", "content": 3}], ["no usable content", "content: 3"]),
        ([{"role": "user", "content": ["x"]}], ["no usable content"]),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], ["no usable content", "image"]),
        ([{"role": "user", "content": [{"type": "text"}]}], ["no usable content"]),
        ([{"role": "user", "content": b"x"}], ["can't be given", "bytes"]),
        ([{"role": "user", "content": "x", "extra": object()}], ["can't be given", "object"]),
        ([{"role": "user", "content": "x", 1: 2}], ["can't be given", "dict"]),
        ([{"role": "user", "content": Evil("x")}], ["can't be given", "Evil"]),
    ],
)
def test_bad_messages_are_refused(messages: Any, words: list[str]) -> None:
    with pytest.raises(PromptError) as caught:
        render(messages, CHATML)
    assert all(word in str(caught.value) for word in [*words, "what to do: "]), str(caught.value)


def test_a_message_that_only_calls_tools_needs_no_content() -> None:
    messages = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]
    assert '[{"name": "f"}]' in render(messages, MISTRAL, eos_token="</s>")


@pytest.mark.parametrize("name", ["messages", "add_generation_prompt", "bos_token", "eos_token"])
def test_what_the_renderer_sets_cannot_be_set(name: str) -> None:
    with pytest.raises(ChatTemplateError, match=f"found: {name}"):
        render(HELLO, CHATML, kwargs={name: "x"})


def test_objects_cannot_be_passed_as_variables() -> None:
    with pytest.raises(PromptError, match="chat_template_kwargs holds"):
        render(HELLO, CHATML, kwargs={"tools": [print]})


# --- templates that fail or attack ----------------------------------------------------------------------

FAILING = {
    "syntax": ("a\n{% if %}", "line 2"),
    "unknown tag": ("{% python %}", "unknown tag"),
    "unknown filter": ("{{ 1 | nothing }}", "nothing"),
    "undefined": ("{{ nothing.more }}", "UndefinedError"),
    "own error": ("{{ raise_exception('only users') }}", "only users"),
    "division": ("{{ 1 / 0 }}", "ZeroDivisionError"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "nested too deeply": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", ""),
    "include": ("{% include '/etc/passwd' %}", "no loader"),
    "import": ("{% import '/etc/passwd' as x %}", "no loader"),
    "extends": ("{% extends '/etc/passwd' %}", "no loader"),
}

UNSAFE = {
    "class": "{{ ''.__class__ }}",
    "class by item": "{{ ''['__class__'] }}",
    "class by filter": "{{ '' | attr('__class__') }}",
    "mro": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals of a function": "{{ raise_exception.__globals__ }}",
    "globals of a function by filter": "{{ strftime_now | attr('__globals__') }}",
    "module of dict": "{{ dict.__globals__['json'] }}",
    "init of a namespace": "{{ namespace.__init__.__globals__ }}",
    "underscore in a namespace": "{{ namespace(__class__=1) }}",
    "underscore set in a namespace": "{% set n = namespace() %}{% set n._x = 1 %}",
    "environment": "{{ self._TemplateReference__context.environment }}",
    "frames": "{{ (x for x in []).gi_frame }}",
    "format": "{{ '{0.__class__}'.format('x') + nothing.more }}",
    "format map": "{{ '{a.__class__}'.format_map({'a': 1}) + nothing.more }}",
    "append": "{{ messages.append({}) }}",
    "clear": "{{ messages.clear() }}",
    "pop": "{{ messages[0].pop('role') }}",
    "update": "{{ messages[0].update(role='system') }}",
    "setdefault": "{{ messages[0].setdefault('x', 1) }}",
    "sort": "{{ messages.sort() }}",
    "update by the class": "{{ dict.update(messages[0], {'role': 'system'}) }}",
}

GREEDY = {
    "huge range": "{% for i in range(10 ** 9) %}{% endfor %}",
    "huge list": "{{ range(999999999) | list }}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "power of a power": "{{ (2 ** 4000) ** 4000 }}",
    "squares": "{% set n = namespace(x=9) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "repeated text": "{{ 'x' * 10 ** 12 }}",
    "repeated the other way": "{{ 10 ** 12 * 'x' }}",
    "repeated list": "{{ [0] * 10 ** 12 }}",
    "endless output": "{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
}


@pytest.mark.parametrize("case", FAILING)
def test_failing_templates_are_chat_template_errors(case: str) -> None:
    template, words = FAILING[case]
    with pytest.raises(ChatTemplateError) as caught:
        render(HELLO, template)
    assert words in str(caught.value)
    assert "what to do: " in str(caught.value)


@pytest.mark.parametrize("case", UNSAFE)
def test_unsafe_templates_are_refused(case: str) -> None:
    messages = copy.deepcopy(HELLO)
    with pytest.raises(ChatTemplateError) as caught:
        render(messages, UNSAFE[case] + "{{ nothing.after }}")
    reasons = ("SecurityError", "UndefinedError", "TemplateSyntaxError", "valid Jinja")
    assert any(reason in str(caught.value) for reason in reasons), str(caught.value)
    assert messages == HELLO


@pytest.mark.parametrize("case", UNSAFE)
def test_unsafe_templates_print_nothing_of_python(case: str) -> None:
    try:
        text = render(HELLO, UNSAFE[case])
    except ChatTemplateError:
        return
    assert text in ("", "x"), "an undefined attribute may print as nothing"


@pytest.mark.parametrize("case", GREEDY)
def test_greedy_templates_are_stopped(case: str) -> None:
    with pytest.raises(ChatTemplateError, match="OverflowError"):
        render(HELLO, GREEDY[case])


def test_ordinary_arithmetic_still_works() -> None:
    assert render(HELLO, "{{ 2 ** 10 * 3 }} {{ '-' * 3 }} {{ 1.5 * 2 }} {{ 2 ** -1 }} {{ [0] * 2 }}") == (
        "3072 --- 3.0 0.5 [0, 0]"
    )


def test_json_is_not_escaped_and_takes_options() -> None:
    value = {"b": "<é>", "a": 1}
    template = "{{ tools | tojson(sort_keys=true, indent=2) }}"
    assert render(HELLO, template, kwargs={"tools": value}) == json.dumps(
        value, ensure_ascii=False, sort_keys=True, indent=2
    )
