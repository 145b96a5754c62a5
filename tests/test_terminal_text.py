"""What people are shown: text that cannot steer their terminal, and the chart of a reply's layers at any width."""

from __future__ import annotations

import io
import re
import sys

import pytest

from runtime.commands.footer import print_layers
from runtime.errors import printable


@pytest.mark.parametrize(
    "text",
    [
        "tab\tand\nnewline",
        "👩‍👩‍👧 🏳️‍🌈 ❤️ 👍🏽 🇩🇪 1️⃣",  # joiners, variation selectors, skin tones, flags, keycaps
        "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",  # a flag spelled with tags
        "e\u0301 \u0928\u093f\u200d \u0645\u06cc\u200c\u062e",  # combining marks; joiners of Devanagari and Persian
        "no\u00a0break, ideographic\u3000space, soft\u00adhyphen",
        "\U0001fadf \U0001fae9",  # newer than some Pythons' Unicode
    ],
)
def test_writing_stays_as_it_is(text: str) -> None:
    assert printable(text) == text


@pytest.mark.parametrize(
    "char",
    [
        *map(chr, [0, 7, 8, 11, 13, 27, 127, 0x80, 0x9B, 0x9F, 0x2028, 0x2029]),
        *"\u202a\u202d\u202e\u2066\u2069",
        "\udcff",
    ],
)
def test_what_steers_a_terminal_is_made_visible(char: str) -> None:
    assert printable(f"a{char}b") == "a\ufffdb"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize(
    ("n_layers", "columns", "rows"), [(1, 80, 1), (6, 20, 6), (32, 80, 11), (80, 80, 16), (80, 20, 80)]
)
def test_a_chart_of_any_number_of_layers(
    n_layers: int, columns: int, rows: int, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(raw, encoding=encoding))
    shares = [(i + 1) / 2 / n_layers for i in range(n_layers)]
    print_layers("layers", shares)
    sys.stderr.flush()
    text = raw.getvalue().decode(encoding)
    found = {int(i): (bar, float(share)) for i, bar, share in re.findall(r"(\d+) ([█-▏#]*) +([\d.]+)%", text)}
    assert [found[i][1] for i in range(n_layers)] == [round(100 * share, 1) for share in shares]
    lengths = [len(found[i][0]) for i in range(n_layers)]
    assert lengths == sorted(lengths)
    assert lengths[-1] >= 4
    lines = (
        text.split("(the longest bar: 50.0%)")[-1].strip("\n").splitlines()
        if columns > 30
        else text.splitlines()[-rows:]
    )
    assert len(lines) == rows
    assert all(len(line) <= columns for line in text.splitlines())


def test_no_layer_that_computes(capsys: pytest.CaptureFixture[str]) -> None:
    print_layers("layers", [0.0, 0.0])
    assert capsys.readouterr().err.count("0.0%") == 3
