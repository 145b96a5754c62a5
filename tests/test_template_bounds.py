"""What a hostile chat template gets: an error, soon and without memory; and what a bound must not change."""

from __future__ import annotations

import json
import sys
import time

import jinja2
import pytest
from fuzz.worker import reset_peak, status
from jinja2.sandbox import ImmutableSandboxedEnvironment

from runtime.errors import UserError
from runtime.text.bounded_template import BUDGET, SECONDS
from runtime.text.chat_template import render

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
MESSAGES = [{"role": "user", "content": "a text "}] * 3

LOOP = "{%% set ns = namespace(x='aaaa') %%}{%% for i in range(64) %%}{%% set ns.x = %s %%}{%% endfor %%}{{ ns.x | string | length }}"
HOSTILE = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "output": "{% for i in range(99999) %}{{ messages }}{{ 'x' * 9999 }}{% endfor %}",
    "text of the template": "{% set x %}{% for i in range(99999) %}" + "x" * 9999 + "{% endfor %}{% endset %}",
    "calls": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "times": "{{ 'x' * 10**10 }}",
    "times, turned": "{{ 10**10 * 'x' }}",
    "a list's times": "{{ ([1] * 10**10) | length }}",
    "power": "{{ 7 ** (10**10) }}",
    "doubled by +": LOOP % "ns.x + ns.x",
    "doubled by ~": LOOP % "ns.x ~ ns.x",
    "doubled by format": LOOP % "'%s%s' % (ns.x, ns.x)",
    "doubled by join": LOOP % "[ns.x, ns.x] | join",
    "doubled by replace": LOOP % "ns.x | replace('a', 'aa')",
    "doubled by str.format": LOOP % "'{0}{0}'.format(ns.x)",
    "doubled in a list": LOOP % "[ns.x, ns.x]",
    "doubled in numbers": "{% set ns = namespace(x=7) %}{% for i in range(64) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "ljust": "{{ 'x'.ljust(10**10) }}",
    "center": "{{ 'x' | center(10**10) }}",
    "expandtabs": "{{ ('\\t' * 10**5).expandtabs(10**5) }}",
    "to_bytes": "{{ (1).to_bytes(10**10, 'big') }}",
    "replace": "{{ ('x' * 10**6).replace('', 'x' * 10**6) }}",
    "join": "{{ ('x' * 10**6).join(range(99999) | map('string')) }}",
    "join of one text": "{{ (['x' * 10**6] * 10**5) | join }}",
    "batch": "{{ [1] | batch(10**10, 0) | list }}",
    "indent": "{{ ('\\n' * 10**5) | indent(10**5) }}",
    "tojson": "{{ messages | tojson(indent=10**10) }}",
    "printf": "{{ '%010000000000d' % 1 }}",
    "printf's star": "{{ '%*d' % (10**9, 1) }}",
    "printf's precision": "{{ '%.999999999f' % 1 }}",
    "printf as a filter": "{{ '%999999999d' | format(1) }}",
    "format": "{{ '{:999999999}'.format(1) }}",
    "format's own field": "{{ '{:{w}}'.format(1, w=10**9) }}",
    "format_map": "{{ '{x:999999999}'.format_map({'x': 1}) }}",
    "a slow filter": "{{ ('http://a.b/ ' * 10**6) | urlize }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "nesting": "{{" + "(" * 9999 + "1" + ")" * 9999 + "}}",
    "length": "x" * (1 << 20) + "x",
}  # fmt: skip


def peak(anew: bool = False) -> int:
    """Largest memory of this process so far, in bytes; 0 where the system does not say."""
    if sys.platform != "linux":
        return 0
    if anew:
        reset_peak()
    return status("VmHWM")


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template(name: str) -> None:
    before, begun = peak(anew=True), time.process_time()
    with pytest.raises(UserError, match=r"^chat template"):
        render(HOSTILE[name], MESSAGES, SPECIAL)
    assert time.process_time() - begun < 2 * SECONDS
    assert peak() - before < 2.5 * BUDGET


@pytest.mark.parametrize("attribute", ["__class__", "__init__.__globals__", "format.__self__", "gi_frame"])
def test_internals_stay_closed(attribute: str) -> None:
    template = f"{{{{ messages[0].content.{attribute} }}}}"
    try:
        assert render(template, MESSAGES, SPECIAL) == ""
    except UserError as error:
        assert "unsafe" in error.message


ORDINARY = """\
{%- set ns = namespace(n=0, text='') -%}
{%- for m in messages if m.role != 'x' -%}
{{ loop.index }}/{{ loop.length }}{{ ', ' if not loop.last else '' }}{% set ns.n = ns.n + m.content | length %}{% set ns.text = ns.text ~ m.content ~ ns.n %}
{%- else -%}none{%- endfor -%}
{{ ns.text }} {{ 'a' ~ 1 ~ none ~ [1, 'b'] }} {{ '%5.2f|%-4s' % (1.5, 'x') }} {{ '{:>6}|{}'.format('x', 2) }} {{ '%d'|format(3) }}
{{ messages | map(attribute='role') | unique | list }} {{ [3, 1, 2] | sort | join('-') }} {{ range(5) | sum }} {{ messages | tojson(indent=2) }}
{%- for row in [1, 2, 3] | batch(2, 0) %}{{ row }}{% endfor %}{% for a, b in {'x': 1}.items() %}{{ a }}{{ b }}{% endfor %}
{%- macro f(x) %}<{{ x }}{{ caller() if caller }}>{% endmacro %}{{ f(1) }}{% call f(2) %}in{% endcall %}
{%- for n in [[1, []], [2, []]] recursive %}{{ n[0] }}{{ loop(n[1]) if n[1] }}{% endfor %}{{ 'x' * 3 + 'y'.center(5) }}{{ 7 % 3 }}{{ 2 ** 10 }}
{% filter upper %}abc{% endfilter %}{{ undefined_thing }}{{ undefined_thing | default('d') }}{{ (messages | selectattr('role', 'equalto', 'user') | list | length) }}
"""


def test_an_ordinary_template_is_rendered_as_ever() -> None:
    plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    plain.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    expected = plain.from_string(ORDINARY).render(messages=MESSAGES, bos_token="<s>")
    assert render(ORDINARY, MESSAGES, SPECIAL) == expected


def test_a_long_conversation_is_within_bounds() -> None:
    messages = [
        {"role": "user" if i % 2 == 0 else "assistant", "content": "\N{SNOWMAN} text " * 500} for i in range(400)
    ]
    template = "{% for m in messages %}{{ '<|' + m.role + '|>' ~ m.content | trim | replace('x', 'y') + eos_token }}{% endfor %}"
    rendered = jinja2.Environment().from_string(template).render(messages=messages, eos_token="</s>")
    assert render(template, messages, SPECIAL) == rendered
