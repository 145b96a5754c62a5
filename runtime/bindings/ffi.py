"""Typed ctypes stubs: a C function is declared once, as an annotated Python function, and resolved on its first call.

    @stub(GGML_BASE)
    def ggml_nbytes(tensor: TensorP) -> SizeT: ...

The annotations are the declaration: each one carries the ctypes type for the call and the C spelling that a test hands
to the C compiler together with the installed headers.
This module knows where llama-cpp-python keeps its shared libraries; it knows nothing of what they do.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

from runtime.bindings.waiting import settle
from runtime.errors import UserError

PINNED = "0.3.36"  # of llama-cpp-python, as in pyproject.toml
_REINSTALL = f"reinstall it: pip install --force-reinstall llama-cpp-python=={PINNED}"

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class C:
    """Metadata of an annotation: the ctypes type and its spelling in C."""

    ctype: Any
    spelling: str


class Handle(ctypes.c_void_p):
    """A typed opaque pointer. Falsy when NULL. Subclasses set `spelling`, e.g. "struct ggml_context *"."""

    spelling = "void *"


Bool = Annotated[bool, C(ctypes.c_bool, "bool")]
Int = Annotated[int, C(ctypes.c_int, "int")]
Int32 = Annotated[int, C(ctypes.c_int32, "int32_t")]
Int64 = Annotated[int, C(ctypes.c_int64, "int64_t")]
UInt32 = Annotated[int, C(ctypes.c_uint32, "uint32_t")]
SizeT = Annotated[int, C(ctypes.c_size_t, "size_t")]
Float = Annotated[float, C(ctypes.c_float, "float")]
CharP = Annotated[bytes, C(ctypes.c_char_p, "const char *")]
VoidP = Annotated[int | None, C(ctypes.c_void_p, "void *")]
ConstVoidP = Annotated[int | None, C(ctypes.c_void_p, "const void *")]


def c_type(annotation: Any) -> C:
    """The ctypes type and C spelling behind an annotation of a stub."""
    if annotation is None:
        return C(None, "void")
    for entry in getattr(annotation, "__metadata__", ()):
        if isinstance(entry, C):
            return entry
    if isinstance(annotation, type) and issubclass(annotation, Handle):
        return C(annotation, annotation.spelling)
    if isinstance(annotation, type) and issubclass(annotation, ctypes.Structure):
        return C(annotation, f"struct {annotation.__name__}")
    raise TypeError(f"annotation {annotation!r} has no C type")


@dataclass
class Library:
    """One of the shared libraries of llama-cpp-python; opened on first use.

    `stubs` lists every function declared for it, so that a test can check them all.
    """

    name: str
    needs: tuple[Library, ...] = ()
    stubs: dict[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def cdll(self) -> ctypes.CDLL:
        """The opened library.

        Raises UserError when it is missing or another version than the pinned one.
        """
        for library in self.needs:
            _ = library.cdll
        if not self.needs:
            _settle_waiting()
        return _open(self.name)

    def symbol(self, name: str) -> Any:
        """The raw foreign function `name`; a UserError when this build of the library lacks it."""
        try:
            return getattr(self.cdll, name)
        except AttributeError:
            raise UserError(
                f"lib{self.name}: no function `{name}`, expected that of llama-cpp-python {PINNED}", _REINSTALL
            ) from None


def library_folder() -> Path:
    """The folder from which `import llama_cpp` opens its libraries (found without importing it)."""
    if override := os.environ.get("LLAMA_CPP_LIB_PATH"):
        return Path(override)
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise UserError("llama-cpp-python is not installed", f"pip install llama-cpp-python=={PINNED}")
    return Path(spec.origin).parent / "lib"


def _settle_waiting() -> None:
    """Before the first library, which brings OpenMP's with it."""
    line = settle()
    if os.environ.get("LAZYNEURON_LOG"):
        print(line, file=sys.stderr)


def _file_names(name: str) -> tuple[str, ...]:
    if sys.platform == "win32":
        return (f"{name}.dll", f"lib{name}.dll")
    return (f"lib{name}.so", f"lib{name}.dylib") if sys.platform == "darwin" else (f"lib{name}.so",)


def _open(name: str) -> ctypes.CDLL:
    # The wheel holds each library under three names that are copies. The loader tells copies apart by file, so
    # whichever was opened first must be found again by its soname: a second copy would have its own registries of
    # backends.
    if hasattr(os, "RTLD_NOLOAD"):
        try:
            return ctypes.CDLL(f"lib{name}.so.0", mode=os.RTLD_NOLOAD | os.RTLD_LOCAL)
        except OSError:
            pass  # not loaded yet
    folder = library_folder()
    for candidate in _file_names(name):
        path = folder / candidate
        if path.exists():
            try:
                return ctypes.CDLL(str(path))
            except OSError as error:
                raise UserError(f"`{path}`: {error}", _REINSTALL) from None
    raise UserError(f"`{folder}`: no {' or '.join(_file_names(name))} in it", _REINSTALL)


def stub(library: Library) -> Callable[[F], F]:
    """Declare a C function of `library`; the decorated function's body is never run."""

    def declare(function: F) -> F:
        @functools.wraps(function)
        def first_call(*args: Any) -> Any:
            foreign = resolved(library, function.__name__)
            # From now on the module's own name is the foreign function itself: no Python frame per call.
            function.__globals__[function.__name__] = foreign
            return foreign(*args)

        library.stubs[function.__name__] = function
        return first_call  # type: ignore[return-value]

    return declare


def resolved(library: Library, name: str) -> Any:
    """The foreign function of a stub, with its types."""
    foreign = library.symbol(name)
    *arguments, result = (c_type(a) for a in _annotations(library.stubs[name]).values())
    foreign.argtypes = [a.ctype for a in arguments]
    foreign.restype = result.ctype
    return foreign


def _annotations(function: Any) -> dict[str, Any]:
    annotations: dict[str, Any] = function.__annotations__
    if "return" not in annotations:
        raise TypeError(f"{function.__name__}: a stub needs a return annotation")
    return annotations


GGML_BASE = Library("ggml-base")
GGML_CPU = Library("ggml-cpu", (GGML_BASE,))
GGML = Library("ggml", (GGML_CPU,))
LLAMA = Library("llama", (GGML,))
