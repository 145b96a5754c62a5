"""Chat templates against transformers' own rendering, and what a broken or hostile one gets."""

from __future__ import annotations

import re
import threading
import warnings
from datetime import datetime
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from runtime.errors import UserError
from runtime.text import chat_template
from runtime.text.chat_template import render

LLAMA3 = """\
{%- set loop_messages = messages %}
{%- for message in loop_messages %}
    {%- set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim \
+ '<|eot_id|>' %}
    {%- if loop.index0 == 0 %}
        {%- set content = bos_token + content %}
    {%- endif %}
    {{- content }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
CHATML = """\
{% if not messages[0]['role'] == 'system' %}
    {{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}
{% endif %}
{% for message in messages %}
    {% if message['role'] == 'assistant' %}
    {% generation %}
{{ '<|im_start|>assistant\n' + message.content + '<|im_end|>' + '\n' }}
    {% endgeneration %}
    {% else %}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
    {% endif %}
    {% if loop.index > 50 %}{% break %}{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
"""
LLAMA2 = """\
{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}\
{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}\
{% set system_message = false %}{% endif %}{% for message in loop_messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{% if loop.index0 == 0 and system_message != false %}\
{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}\
{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}\
{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}\
{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}
"""
ODDS = """\
{{- messages | tojson }} {{ messages[0] | tojson(indent=2) }} {{ strftime_now('%Y') }}
{%- set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + m.content | length %}{% endfor %}{{ ns.n }}
    {%- for m in messages if m.role != 'system' -%}
        {{ loop.first ~ m['content'].split('\n')[-1].startswith('a') ~ m.get('name', 'nobody') }}
    {%- endfor %}
"""
TEMPLATES = {"llama-3": LLAMA3, "chatml": CHATML, "llama-2": LLAMA2, "odds": ODDS}

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
USER = {"role": "user", "content": '  What\'s <b>"5 > 3"</b>?\nSay é 🙂 '}
ASSISTANT = {"role": "assistant", "content": " True & plain.\n"}
SYSTEM = {"role": "system", "content": "You are terse."}
CONVERSATIONS = [[USER], [SYSTEM, USER], [USER, ASSISTANT, USER], [SYSTEM, USER, ASSISTANT, USER, ASSISTANT]]


@pytest.fixture(scope="module")
def reference() -> Any:
    empty = Tokenizer(models.BPE())
    return PreTrainedTokenizerFast(tokenizer_object=empty, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("generation_prompt", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_equals_transformers(name: str, generation_prompt: bool, reference: Any) -> None:
    for messages in CONVERSATIONS:
        expected = reference.apply_chat_template(
            messages, chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=generation_prompt
        )
        assert render(TEMPLATES[name], messages, SPECIAL, generation_prompt) == expected


def test_a_known_prompt_to_the_letter() -> None:
    assert render(LLAMA3, [SYSTEM, {"role": "user", "content": "Hi "}], SPECIAL) == (
        "<s><|start_header_id|>system<|end_header_id|>\n\nYou are terse.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_the_date_is_todays() -> None:
    assert render("{{ strftime_now('%d %b %Y') }}", [USER], {}) == datetime.now().strftime("%d %b %Y")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (LLAMA2, "roles must alternate"),
        ("{{ messages[0]['content'", "line 1"),
        ("{% for m in messages %}", "line 1"),
        ("{{ messages[0].content + 1 }}", "str"),
        ("{{ nothing.at.all }}", "undefined"),
        ("{{ 1 // 0 }}", "zero"),
        ("{% include 'other' %}", "loader"),
    ],
)
def test_a_template_that_fails_is_one_line(template: str, message: str) -> None:
    with pytest.raises(UserError, match=f"chat template.*{message}") as caught:
        render(template, [USER, USER], SPECIAL)
    assert caught.value.hint


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ render.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
    ],
)
def test_the_sandbox_holds(template: str) -> None:
    with pytest.raises(UserError, match=re.compile("unsafe|undefined|too big", re.IGNORECASE)):
        render(template, [USER], {})


def test_messages_are_not_changed_by_a_template() -> None:
    messages = [dict(USER)]
    with pytest.raises(UserError):
        render("{% set _ = messages[0].update({'content': 'x'}) %}", messages, {})
    assert messages == [USER]


def test_two_threads_leave_the_filters_of_warnings_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that began first ends first."""
    made, entered, left = chat_template.BoundedEnvironment.from_string, threading.Semaphore(0), threading.Event()

    def slow(*arguments: Any, **options: Any) -> Any:
        entered.release()
        if threading.current_thread() is first:
            second.start()
            for _ in range(2):
                entered.acquire(timeout=0.3)
        else:
            left.wait(0.3)
        return made(*arguments, **options)

    monkeypatch.setattr(chat_template.BoundedEnvironment, "from_string", slow)
    first = threading.Thread(target=lambda: (render("{{ bos_token }}", [], {}), left.set()))
    second = threading.Thread(target=render, args=("{{ bos_token }}", [], {}))
    before = list(warnings.filters)
    first.start()
    first.join()
    second.join()
    assert warnings.filters == before


PASSED = """\
{%- if tools is not none %}TOOLS{% endif %}{% if documents is not none %}DOCUMENTS{% endif %}{{ tools is defined }}
{{- pad_token ~ unk_token ~ bos_token ~ eos_token ~ image_token }} {{ sep_token is defined }} {{ add_generation_prompt }}
{{- messages[0] | tojson(False, 2) }} {{ {'b': 1, 'a': ['é<&']} | tojson(true, none, (',', ':'), true) }}
{{- {'b': 1, 'a': 'é'} | tojson(separators=(';', '='), sort_keys=True) }}
{%- set mood = 'calm' %}
{%- for m in messages %}
    {%- generation %}
        {%- set mood = 'loud' %}
        {{- mood ~ m.role }}
    {%- endgeneration %}
    {%- if loop.index == 3 %}{% break %}{% endif %}
    {%- if m.role == 'system' %}{% continue %}{% endif %}
    {{- loop.index ~ m.content | trim }}
{%- endfor %}
{{- mood }}
"""


@pytest.mark.parametrize("generation_prompt", [True, False])
def test_all_that_transformers_passes(generation_prompt: bool) -> None:
    special = {name: f"<{name[:3]}>" for name in ("bos_token", "eos_token", "pad_token", "unk_token", "image_token")}
    reference = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **special)
    for messages in CONVERSATIONS:
        expected = reference.apply_chat_template(
            messages, chat_template=PASSED, tokenize=False, add_generation_prompt=generation_prompt
        )
        assert render(PASSED, messages, special, generation_prompt) == expected


def test_a_token_that_the_tokenizer_lacks_is_undefined(reference: Any) -> None:
    template = "{{ pad_token is defined }}{{ pad_token }}{{ additional_special_tokens is defined }}"
    expected = reference.apply_chat_template([USER], chat_template=template, tokenize=False)
    assert render(template, [USER], SPECIAL) == expected == "FalseFalse"
