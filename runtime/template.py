"""Chat messages to one prompt string, by the Jinja template that a model file carries.

The template comes from whoever made the file: it runs in Jinja's sandbox, within bounds of time and memory, with the names that
Hugging Face's own rendering offers. Knows nothing of token ids.
"""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from runtime.bounded_template import BoundedEnvironment
from runtime.errors import UserError

_compiling = threading.Lock()  # filters of warnings belong to the whole process: two threads would restore each other's
_HINT = "the model file's chat template does not accept this conversation"


def render(
    template: str, messages: Sequence[Mapping[str, str]], bos: str, eos: str, add_generation_prompt: bool = True
) -> str:
    """The prompt for `messages` (each with `role` and `content`); special tokens are spelled out in it, BOS included.

    bos, eos: the tokens' texts. add_generation_prompt: end where the assistant's reply begins.
    Raises UserError when the template is broken, refuses the messages, or computes too much.
    """
    environment = _environment()
    try:
        with environment.bounded():
            return _compiled(template).render(
                messages=[dict(message) for message in messages],
                bos_token=bos,
                eos_token=eos,
                add_generation_prompt=add_generation_prompt,
            )
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


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: marks the assistant's text for training; here its body alone counts."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=1)
def _environment() -> BoundedEnvironment:
    environment = BoundedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(value: Any, indent: int | None = None, **options: Any) -> str:
    # Jinja's own filter escapes <, > and & for HTML, which would change the prompt.
    options.setdefault("ensure_ascii", False)
    return json.dumps(value, indent=indent, **options)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:  # noqa: A002  (the name that templates use)
    return datetime.now().strftime(format)
