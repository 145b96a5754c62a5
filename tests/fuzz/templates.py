"""Chat templates made up at random out of what Jinja has, with numbers that are too large: rendering must stay within its bounds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

from fuzz import mutate
from fuzz.worker import Files, Target
from runtime.text.bounded_template import BoundedEnvironment
from runtime.text.chat_template import render

CHATML = """\
{% for message in messages %}{% if loop.first and message.role != 'system' %}<|system|>{% endif %}
{{- '<|im_start|>' + message['role'] + '\\n' + message.content | trim + '<|im_end|>' + '\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
MESSAGES = [
    {"role": role, "content": f"{role} says \U0001f600 {{{{ 1 }}}} " * 20}
    for role in ("system", "user", "assistant", "user")
]
_NUMBERS = (
    "0",
    "1",
    "-1",
    "2",
    "3",
    "60",
    "1000",
    "99999",
    "10**6",
    "10**10",
    "2**31",
    "2**63",
    "1.5",
    "1e308",
    "-10**9",
)
_TEXTS = ("''", "'a'", "'ab ' * 1000", "'\\t'", "'<a href=x>'", "'http://x.y/'", "'%d'", "'%9999d'", "'%*d'", "'%(a)s' * 99", "'{}'", "'{0:>99999}'", "'{:{}}'", "'{0.__class__}'", "'{0[__class__]}'", "'é😀'")  # fmt: skip
_NAMES = ("messages", "bos_token", "x", "y", "ns", "ns.x", "loop", "loop.index", "self", "namespace", "cycler", "joiner", "dict", "range", "messages[0].content", "raise_exception", "strftime_now", "undefined_name", "none", "true", "caller")  # fmt: skip
_METHODS = (
    "upper", "strip", "split", "rsplit", "splitlines", "replace", "join", "center", "ljust", "rjust", "zfill", "expandtabs", "encode", "decode", "format",
    "format_map", "translate", "title", "partition", "count", "find", "startswith", "items", "keys", "values", "get", "append", "extend", "update", "pop",
    "copy", "to_bytes", "bit_length", "hex", "__class__", "__init__", "__globals__", "__mul__", "__format__", "mro", "gi_frame", "func_globals", "next", "current",
)  # fmt: skip
_FILTERS = tuple(sorted(name for name in BoundedEnvironment().filters if " " not in name))
_TESTS = ("defined", "string", "sameas(x)", "divisibleby(0)", "in(messages)", "filter", "mapping", "eq(10**10)")


Part = Callable[[], str]


def _arguments(rng: Random, e: Part) -> str:
    return ", ".join(e() for _ in range(rng.choice((0, 1, 1, 2, 3))))


_OPERATORS = ("*", "*", "+", "**", "%", "~", "~", "-", "/", "//", "in", "==", "and", "or")
_EXPRESSIONS: tuple[Callable[[Random, Part], str], ...] = (
    *[lambda rng, e: f"({e()}) {rng.choice(_OPERATORS)} ({e()})"] * 3,
    *[lambda rng, e: f"({e()})|{rng.choice(_FILTERS)}"] * 2,
    *[lambda rng, e: f"({e()})|{rng.choice(_FILTERS)}({_arguments(rng, e)})"] * 2,
    *[lambda rng, e: f"({e()}).{rng.choice(_METHODS)}({_arguments(rng, e)})"] * 2,
    lambda rng, e: f"({e()}).{rng.choice(_METHODS)}",
    lambda rng, e: f"[{_arguments(rng, e)}]",
    lambda _rng, e: f"{{'a': {e()}, {e()}: 1}}",
    lambda rng, e: f"range({e()})|{rng.choice(('list', 'join', 'sum', 'string', 'length', 'map(0)|join'))}",
    lambda _rng, e: f"range({e()})|map('string')|join({e()})",
    lambda _rng, e: f"({e()})[{e()}]",
    lambda rng, e: f"({e()})[{e()}:{e()}:{rng.choice(_NUMBERS)}]",
    lambda rng, e: f"({e()}) is {rng.choice(_TESTS)}",
    lambda rng, e: f"f({_arguments(rng, e)})",
    lambda rng, e: f"cycler({_arguments(rng, e)}).next()",
    lambda _rng, e: f"namespace(x={e()})",
    lambda _rng, e: f"dict(a={e()})",
    lambda _rng, e: f"({e()} if {e()} else {e()})",
)


def expression(rng: Random, depth: int) -> str:
    """An expression, nested no deeper than `depth`."""
    if depth <= 0 or rng.randrange(6) == 0:
        return rng.choice((*_NUMBERS, *_TEXTS, *_NAMES))
    return rng.choice(_EXPRESSIONS)(rng, lambda: expression(rng, depth - 1))


def _loop(rng: Random, s: Part, e: Part) -> str:
    over = rng.choice(("range(99999)", f"range({e()})", "messages", e()))
    names, rest = rng.choice(("x", "y", "x, y")), rng.choice(("", "", " recursive", " if x"))
    return f"{{% for {names} in {over}{rest} %}}{s()}{{% endfor %}}"


def _growing(rng: Random, _s: Part, e: Part) -> str:
    grown = rng.choice(("ns.x ~ ns.x", "ns.x + ns.x", "ns.x * 2", "[ns.x, ns.x]", e()))
    return f"{{% set ns = namespace(x={e()}) %}}{{% for y in range(60) %}}{{% set ns.x = {grown} %}}{{% endfor %}}{{{{ ns.x }}}}"


_STATEMENTS: tuple[Callable[[Random, Part, Part], str], ...] = (
    *[lambda _rng, _s, e: f"{{{{ {e()} }}}}"] * 3,
    _loop,
    _loop,
    _growing,
    lambda rng, s, e: f"{{% set {rng.choice(('x', 'y', 'ns', 'ns.x'))} = {e()} %}}{s()}",
    lambda _rng, s, _e: f"{{% set x %}}{s()}{{% endset %}}{s()}",
    lambda _rng, s, e: f"{{% macro f(x, y=1) %}}{s()}{{% endmacro %}}{{{{ f({e()}) }}}}",
    lambda _rng, s, e: f"{{% if {e()} %}}{s()}{{% endif %}}",
    lambda rng, s, _e: f"{{% filter {rng.choice(_FILTERS)} %}}{s()}{{% endfilter %}}",
    lambda _rng, s, e: f"{{% call f({e()}) %}}{s()}{{% endcall %}}",
    lambda _rng, _s, e: f"{{% include {e()} %}}",
    lambda _rng, s, _e: f"{{% generation %}}{s()}{{% endgeneration %}}",
)


def statement(rng: Random, depth: int) -> str:
    """A piece of a template, nested no deeper than `depth`."""
    kinds = _STATEMENTS if depth > 0 else _STATEMENTS[:1]
    return rng.choice(kinds)(rng, lambda: statement(rng, depth - 1), lambda: expression(rng, rng.randrange(5)))


def _made(rng: Random) -> str:
    if rng.randrange(4) == 0:
        return mutate.damaged(rng, CHATML.encode()).decode("utf-8", "replace")
    if rng.randrange(60) == 0:
        return rng.choice(
            (
                "{{" + "(" * 3000,
                "{% if 1 %}" * 3000,
                "{{ " + "-" * 9000 + "1 }}",
                "{{ 1" + "+1" * 9000 + " }}",
                "x" * 2_000_000,
                "{{ " + "[" * 99 + "]" * 99 + " }}",
            )
        )
    return "".join(statement(rng, 3) for _ in range(rng.choice((1, 1, 2, 4))))


def _rendered(folder: Path) -> bool:
    render((folder / "chat_template.jinja").read_text("utf-8"), MESSAGES, SPECIAL)
    return True


def template_targets(rng_of: Callable[[str, int], Random]) -> list[Target]:
    """The one target."""

    def make(index: int) -> Files:
        return {"chat_template.jinja": _made(rng_of("template", index)).encode("utf-8", "replace")}

    return [Target("template", make, _rendered, 0.5, allowance=400 << 20)]
