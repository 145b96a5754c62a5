"""Cards of checkpoints: what of their metadata goes into a file, word for word, and that damage is a note and no end."""

from __future__ import annotations

from pathlib import Path

import pytest

from convert.metadata import general_metadata, read_card


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ("language: no", ["no"]),
        ("language: [no, en, yes, on]", ["no", "en", "yes", "on"]),
        ("language:\n- NO\n- 'de'", ["NO", "de"]),
        ("language: 1", ["1"]),
        ("language: 2024-01-02", ["2024-01-02"]),
        ("language: 0x1f", ["0x1f"]),
        ("language: \u65e5\u672c\u8a9e", ["\u65e5\u672c\u8a9e"]),
        ("language: !!python/name:os.system x", ["x"]),
        ("language:", None),
        ("language: null", None),
        ("language: ~", None),
        ("license: mit", None),
        ("", None),
    ],
)
def test_words_are_taken_as_they_are_written(metadata: str, expected: list[str] | None, tmp_path: Path) -> None:
    for number, (before, end) in enumerate((("", "\n"), ("\ufeff", "\n"), ("", "\r\n"), ("\n", "\n"))):
        path = tmp_path / f"{number}.md"
        path.write_bytes((before + f"---\n{metadata}\n---\nText: [\n".replace("\n", end)).encode())
        card, notes = read_card(path)
        assert (card.get("language"), notes) == (expected, ())


def test_licence_languages_and_base_model_become_keys(tmp_path: Path) -> None:
    card = "license: other\nlicense_name: own-1.0\nlicense_link: LICENSE\nlanguage: [en, no]\nbase_model: org/base"
    (tmp_path / "README.md").write_text(f"---\n{card}\n---\n")
    found = general_metadata(tmp_path, "", "f16")
    assert {key: found[f"general.{key}"] for key in ("license", "license.name", "languages", "base_model.0.name")} == {
        "license": "other",
        "license.name": "own-1.0",
        "languages": ["en", "no"],
        "base_model.0.name": "base",
    }


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("org/base", "https://huggingface.co/org/base"),
        ("https://huggingface.co/org/base", "https://huggingface.co/org/base"),
        ("./models/base", None),
        ("/home/me/base", None),
        ("hf://", None),
        ("https://huggingface.co/datasets/a/b", None),
        ("a name", None),
    ],
)
def test_a_base_model_is_a_name_on_the_hub(base: str, expected: str | None, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\nbase_model: {base}\n---\n")
    assert general_metadata(tmp_path, "", "f16").get("general.base_model.0.repo_url") == expected


@pytest.mark.parametrize(
    ("card", "why"),
    [
        (b"---\nlicense: mit\ntags: [a\n---\n", "no YAML: while parsing a flow sequence"),
        (b"---\nlicense: mit\n---\ncaf\xe9\n", "byte 24 is not UTF-8"),
        ("---\nlicense: mit\n---\n".encode("utf-16"), "byte 0 is not UTF-8"),
        (b"---\n- a\n- b\n---\n", "a list, expected fields"),
        (b"---\njust words\n---\n", "a str, expected fields"),
        (b"---\nlicense: mit\n", "it does not end with a line `---`"),
        (b"---\n" + b"license: mit\n" * 20_000 + b"---\n", "it does not end with a line `---` within 131072 bytes"),
        (b"---\nlicense: mit\n\x01\n---\n", "no YAML: unacceptable character"),
        (b"---\nlicense: " + b"[" * 5000 + b"\n---\n", "no YAML"),
        (b"---\na: *nowhere\n---\n", "no YAML"),
        (b"---\n? [a]\n: b\n---\n", "no YAML"),
    ],
)
def test_damaged_cards_are_a_note(card: bytes, why: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(card)
    found, (note,) = read_card(tmp_path / "README.md")
    assert found == {}
    assert f"README.md`: its metadata is damaged ({why}" in note
    assert "\n" not in note
    assert "general.license" not in general_metadata(tmp_path, "", "f16")


@pytest.mark.parametrize("value", ["{a: b}", "[[en]]", "[en, {a: b}]", '"a\\tb"', '"\\ud800"', '"a\\nb"'])
def test_a_field_that_is_no_text_is_a_note(value: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\nlanguage: {value}\nlicense: mit\n---\n")
    found, (note,) = read_card(tmp_path / "README.md")
    assert found == {"license": ["mit"]}
    assert "`language` is not a text or a list of texts, left out" in note


def test_a_text_that_refers_to_itself_costs_nothing(tmp_path: Path) -> None:
    layers = "\n".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]" for i in range(12))
    (tmp_path / "README.md").write_text(f"---\na0: &a0 x\n{layers}\nlanguage: *a12\n---\n")
    assert read_card(tmp_path / "README.md")[0] == {}


@pytest.mark.parametrize("text", ["", "# A card without metadata\n", "Text\n---\nlicense: mit\n---\n"])
def test_a_card_without_metadata(text: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text)
    assert read_card(tmp_path / "README.md") == ({}, ())
    assert read_card(tmp_path / "nowhere.md") == ({}, ())
