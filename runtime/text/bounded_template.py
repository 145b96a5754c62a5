"""A Jinja sandbox in which the work of a template is bounded, in time and in memory: a template is as little to be
trusted as the file that carries it.

Jinja's own sandbox keeps templates from Python's internals, and leaves `'x' * 10**10` and loops within loops to them.
Here everything that a template computes is paid for from a budget of bytes: what goes in, times what can multiply it,
before it happens, and what comes out.
"""

from __future__ import annotations

import functools
import re
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from string import Formatter
from typing import Any

from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

BUDGET = 1 << 27  # bytes: hundreds of times the longest prompt
SECONDS = 5.0
LARGEST_TEMPLATE = 1 << 20  # characters; published ones have some thousands
_STEP = 64  # bytes that a call, a filter, or an iteration costs at least
_WIDEST = 1000  # of a field in a format
_BITS = 1 << 16  # of whole numbers
_OTHER = 64  # bytes that an object counts for that is neither a text nor a collection
# Filters that take long for every byte: how many times as dear they are as others.
_DEAR = {
    "pprint": 500,
    "urlize": 100,
    "wordwrap": 100,
    "title": 20,
    "sort": 20,
    "groupby": 20,
    "unique": 10,
    "dictsort": 20,
    "striptags": 20,
}
# Numbers among the arguments say how long the result is, or how often something stands in it.
_MULTIPLYING = frozenset(
    {
        "center",
        "ljust",
        "rjust",
        "zfill",
        "expandtabs",
        "to_bytes",
        "indent",
        "tojson",
        "batch",
        "slice",
        "round",
        "wordwrap",
        "filesizeformat",
    }
)
# Each part of the first may be replaced by, or stand between, the others.
_REPLACING = frozenset({"replace", "translate"})
_PRINTF = re.compile(r"%(?:\([^)]*\))?[#0\- +]*(\*|\d*)(?:\.(\*|\d*))?")
_ITERATED, _JOINED = "iterated by a loop", "joined by ~"  # filters that no template can name


class TooMuch(Exception):  # noqa: N818 - as Jinja's own
    """A template wants more than it may have."""


class _Budget:
    """What is left to one rendering."""

    def __init__(self) -> None:
        self.left, self.end = BUDGET, time.monotonic() + SECONDS

    def spend(self, amount: int) -> None:
        self.left -= amount + _STEP
        if self.left < 0:
            raise TooMuch(f"it computes more than {BUDGET >> 20} MiB of text")
        if time.monotonic() > self.end:
            raise TooMuch(f"it computes for more than {SECONDS:.0f} seconds")

    def size(self, *values: Any) -> int:
        """Bytes of the values when they are spelled out: what stands in two places counts twice. Raises TooMuch above
        what is left.
        """
        total, stack = 0, list(values)
        while stack:
            value = stack.pop()
            if isinstance(value, str | bytes | int | float):
                total += sys.getsizeof(value)
                continue
            total += _OTHER
            if total > self.left:
                self.spend(total)
            if isinstance(value, Mapping):
                stack += [part for pair in value.items() for part in pair]
            elif isinstance(value, Namespace):
                stack.append(value._Namespace__attrs)
            elif isinstance(value, Collection) and not isinstance(value, range):
                stack += value
        return total


_budget: ContextVar[_Budget] = ContextVar("_budget")


class _Paying(NodeTransformer):
    """Puts filters of ours where Jinja has no hook: round what a loop runs over, and in place of `~`."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 - Jinja's name
        self.generic_visit(node)
        node.iter = _filter(node.iter, _ITERATED)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), _JOINED)


def _filter(node: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(
        node,
        name,
        [],
        [],
        None,
        None,
        lineno=node.lineno,
    )


def _iterated(values: Any) -> Iterator[Any]:
    for value in values:
        _budget.get().spend(0)
        yield value


def _joined(values: Iterable[Any]) -> str:
    return "".join(map(str, values))


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox, for templates that are compiled and rendered within `bounded`. They raise TooMuch
    beyond it.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options, finalize=_paid_output)
        self.filters |= {_ITERATED: _iterated, _JOINED: _joined}
        del self.globals["lipsum"]

    @contextmanager
    def bounded(self) -> Iterator[None]:
        """A new budget, for as long as the block runs."""
        token = _budget.set(_Budget())
        # Whatever was registered since: filters are looked up in this mapping when a template runs.
        self.filters = {name: _paid(name, used) for name, used in self.filters.items()}
        try:
            yield
        finally:
            _budget.reset(token)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        if len(source) > LARGEST_TEMPLATE:
            raise TooMuch(f"it has {len(source)} characters, expected at most {LARGEST_TEMPLATE}")
        tree: nodes.Template = _Paying().visit(Parser(self, source, name, filename).parse())
        return tree.set_environment(self)  # type: ignore[return-value]

    def concat(self, parts: Iterable[str]) -> str:
        """What Jinja joins output with."""
        budget, kept = _budget.get(), []
        for part in parts:
            budget.spend(sys.getsizeof(part))
            kept.append(part)
        return "".join(kept)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """An operation of two values."""
        budget = _budget.get()
        budget.spend(budget.size(left, right) + _result_size(budget, operator, left, right))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - as Jinja has it
        """A call of anything."""
        budget, owner = _budget.get(), getattr(__obj, "__self__", None)
        if isinstance(owner, str | bytes | int):
            args = tuple(map(_listed, args))
            _pay(budget, __obj.__name__, (owner, *args), kwargs)
        else:
            budget.spend(budget.size(*args, kwargs))
        result = super().call(__context, __obj, *args, **kwargs)
        budget.spend(budget.size(result))
        return result

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format` with a bound."""
        used = super().wrap_str_format(value)
        if used is None:
            return None
        fields = list(Formatter().parse(value.__self__))

        def paid(*args: Any, **kwargs: Any) -> str:
            budget = _budget.get()
            _check_widths(w for _, _, spec, _ in fields for w in re.findall(r"\d+|{", spec or ""))
            budget.spend(sum(name is not None for _, name, _, _ in fields) * (_WIDEST + budget.size(args, kwargs)))
            return used(*args, **kwargs)

        return paid


def _result_size(budget: _Budget, operator: str, left: Any, right: Any) -> int:
    """Bytes that an operation's result may have beside those of its operands."""
    if operator == "%" and isinstance(left, str | bytes):
        text = left if isinstance(left, str) else left.decode("latin-1")
        found = _PRINTF.findall(text)
        _check_widths(width for pair in found for width in pair)
        return len(found) * (_WIDEST + budget.size(right))
    whole = isinstance(left, int) and isinstance(right, int)
    if operator == "**" and whole and left.bit_length() * max(right, 0) > _BITS:
        raise TooMuch("a power of too many digits")
    if operator == "*" and whole and left.bit_length() + right.bit_length() > _BITS:
        raise TooMuch("a product of too many digits")
    if operator == "*" and not whole and isinstance(left, int) != isinstance(right, int):
        times, values = (left, right) if isinstance(left, int) else (right, left)
        return max(times, 0) * budget.size(values)
    return 0


def _check_widths(widths: Iterable[str]) -> None:
    for width in widths:
        if width in ("*", "{") or len(width) > 4 or int(width or 0) > _WIDEST:
            raise TooMuch(f"a field of width {width[:9]} in a format, expected at most {_WIDEST}")


def _pay(budget: _Budget, name: str, values: Sequence[Any], named: Mapping[str, Any]) -> None:
    """For what a filter or method is about to do."""
    cost = budget.size(*values, named) * _DEAR.get(name, 1)
    if name in _MULTIPLYING:
        for number in (*values, *named.values()):
            cost *= max(1, abs(number)) if isinstance(number, int) else 1
    if name == "replace" and len(values) > 2:
        cost += str(values[0]).count(str(values[1])) * budget.size(values[2])
    elif name in _REPLACING:
        cost *= budget.size(*values[1:], named)
    if name == "join":
        parts = (
            values[1]
            if isinstance(values[0], str | bytes) and len(values) > 1 and not isinstance(values[1], str)
            else values[0]
        )
        cost += len(parts) * budget.size(*values[1:], named) if hasattr(parts, "__len__") else 0
    if name == "format":
        cost += _result_size(budget, "%", str(values[0]), [*values[1:], *named.values()])
    budget.spend(cost)


def _listed(value: Any) -> Any:
    """A list of what an iterator has still to give: its size is known then."""
    if not isinstance(value, Iterator):
        return value
    return list(_iterated(value))


def _paid(name: str, used: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that is paid for."""
    if hasattr(used, "paid"):
        return used
    skipped = int(hasattr(used, "jinja_pass_arg"))  # the first argument is Jinja's context

    @functools.wraps(used)
    def paying(*args: Any, **named: Any) -> Any:
        budget, values = _budget.get(), [*map(_listed, args[skipped:])]
        _pay(budget, name, values, named)
        result = used(*args[:skipped], *values, **named)
        budget.spend(budget.size(result))
        return result

    paying.paid = True  # type: ignore[attr-defined]
    return paying


def _paid_output(value: Any) -> Any:
    budget = _budget.get()
    budget.spend(budget.size(value))
    return value
