"""Texts from files and streams: UTF-8, without the mark that some editors put before it. Each is read once: it may be a
pipe.
"""

from __future__ import annotations

import codecs
import hashlib
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import UserError

# The longer ones first: that of UTF-32 begins like that of UTF-16.
_OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


@dataclass(frozen=True)
class TextFile:
    """A file's text; sha256: of its bytes."""

    path: Path
    sha256: str
    text: str

    @property
    def name(self) -> str:
        """The file's name."""
        return self.path.name


def read_text(path: Path) -> TextFile:
    """A file's text. Raises UserError when it is not UTF-8."""
    raw = path.read_bytes()
    return TextFile(path, hashlib.sha256(raw).hexdigest(), decoded(raw, f"`{path}`"))


def check_mark(raw: bytes, where: str) -> None:
    """Raise UserError, naming `where`, when a text begins with the byte order mark of another encoding than UTF-8."""
    for mark, name in _OTHER_MARKS.items():
        if raw.startswith(mark):
            raise UserError(
                f"{where}: text in {name}, expected UTF-8", f"save it as UTF-8, or: iconv -f {name} -t UTF-8"
            )


def decoded(raw: bytes, where: str, begins: bool = True) -> str:
    """UTF-8 bytes as text. begins: whether a text begins with them, which may be a byte order mark; that is left out.

    Raises UserError, naming `where`, when they are not UTF-8.
    """
    if begins:
        check_mark(raw, where)
    try:
        text = raw.decode("utf-8")
        return text.removeprefix("\ufeff") if begins else text
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: byte {error.start} is {raw[error.start]:#04x}, expected UTF-8 text") from None


def without_line_end(text: str) -> str:
    """`text` without the one line end that ends a file or a line, of Unix or of Windows."""
    return text.removesuffix("\n").removesuffix("\r") if text.endswith("\n") else text
