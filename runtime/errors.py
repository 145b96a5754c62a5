"""The one exception a user may cause.

Knows nothing of models or files: whoever raises `UserError` says where, what was found and what was expected.
"""

from __future__ import annotations

import errno
import re

# Controls (but newline and tab), line and paragraph separators, embeddings, overrides and isolates of bidirectional
# text, lone surrogates. Joiners, variation selectors and tags stay: emoji and several scripts are spelled with them.
_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_LONGEST = 1000  # characters of a message: what it quotes may be a file's, and of any length


def printable(text: str) -> str:
    """`text` with characters that could steer a terminal or turn its writing round made visible; newlines and tabs
    stay.
    """
    return _STEERING.sub("\ufffd", text)


def _line(text: str) -> str:
    """`text` as one line of bounded length that is shown as it is, whatever the file says that it quotes."""
    line = printable(" ".join(text.split()))
    half = _LONGEST // 2
    return line if len(line) <= _LONGEST else f"{line[:half]} ... {line[-half:]}"


class UserError(Exception):
    """A mistake in what the user gave us: a file, an option, an environment. Never a bug of ours.

    message: one line, "where: what was found, what was expected". hint: what to do about it, or "".
    """

    def __init__(self, message: str, hint: str = "") -> None:
        self.message, self.hint = _line(message), _line(hint)
        super().__init__(self.message)


def os_error(error: OSError) -> UserError:
    """Turn an operating-system error into one line that names the file."""
    where = f"`{error.filename}`: " if error.filename else ""
    hints = {
        errno.ENOSPC: "free some space or write to another disk",
        errno.EFBIG: "the file size limit of this shell or file system was reached (see `ulimit -f`)",
        errno.ENOENT: "check the path",
        errno.EACCES: "check the permissions",
        errno.EROFS: "write to another place",
        errno.EDQUOT: "free some space, or write where no quota is used up",
        errno.ENAMETOOLONG: "give it a shorter name",
        errno.EIO: "the disk, or the connection to it, is failing",
    }
    return UserError(f"{where}{error.strerror or error}", hints.get(error.errno or 0, ""))
