"""Chat messages to one prompt string, by the Jinja template that a model file carries.

The template comes from whoever made the file: it runs in Jinja's sandbox, within bounds of time and memory, with the
names that Hugging Face's own rendering offers.
"""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from runtime.errors import UserError
from runtime.text.bounded_template import BoundedEnvironment

_compiling = threading.Lock()  # filters of warnings belong to the whole process: two threads would restore each other's
_HINT = "the model file's chat template does not accept this conversation"


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    special_tokens: Mapping[str, Any],
    add_generation_prompt: bool = True,
    values: Mapping[str, Any] | None = None,
) -> str:
    """The prompt for `messages` (each with `role` and `content`); special tokens are spelled out in it, BOS included.

    special_tokens: what the template may name, such as bos_token -> its text. add_generation_prompt: end where the
    assistant's reply begins. values: others that it may name, such as tools.
    Raises UserError when the template is broken, refuses the messages, or computes too much.
    """
    environment = _environment()
    try:
        named = {**special_tokens, "tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
        with environment.bounded():
            return _compiled(template).render({**named, **(values or {})}, messages=[dict(one) for one in messages])
    except jinja2.TemplateSyntaxError as error:
        raise UserError(
            f"chat template, line {error.lineno}: {error.message}", "the file's template is broken"
        ) from None
    except Exception as error:  # whatever it raises, the template is at fault
        raise UserError(f"chat template: {error}", _HINT) from None


def _compiled(template: str) -> jinja2.Template:
    with _compiling, warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # of the code that Jinja makes of odd expressions
        return _environment().from_string(template)


class _GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}`: marks the assistant's text for training; here its text alone counts.

    What is set inside stays inside, as in Hugging Face's own.
    """

    tags = {"generation"}  # noqa: RUF012  (Jinja's own declaration)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_text"), [], [], body).set_lineno(line)

    def _text(self, caller: Callable[[], str]) -> str:
        return caller()


@lru_cache(maxsize=1)
def _environment() -> BoundedEnvironment:
    environment = BoundedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes <, > and & for HTML, which would change the prompt.
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:  # noqa: A002  (the name that templates use)
    return datetime.now().strftime(format)
