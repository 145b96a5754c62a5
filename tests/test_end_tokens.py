"""Which tokens end a text: those that config.json, generation_config.json and the tokenizer name, and no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vocabularies import converted, edit, train_bytes

from convert.tokenizer.vocabulary import convert_tokenizer
from runtime.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    train_bytes(tmp_path)
    added = {"320": {"content": "<|im_end|>", "special": True}, "321": {"content": "<over>", "special": True}}
    edit(tmp_path / "tokenizer_config.json", eos_token="<|end|>", added_tokens_decoder=added)
    return tmp_path


def ends(folder: Path) -> list[int]:
    with converted(folder, 330) as tokenizer:
        assert [token for token in range(330) if tokenizer.is_eog(token)] == tokenizer.end_ids
        return tokenizer.end_ids


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, [0]),
        ({"config": {"eos_token_id": 321}}, [0, 321]),
        ({"config": {"eos_token_id": [0, 321]}}, [0, 321]),
        ({"generation_config": {"eos_token_id": [320, 321]}}, [0, 320, 321]),
        ({"config": {"eos_token_id": 7}, "generation_config": {"eos_token_id": 321}}, [0, 7, 321]),
        ({"config": {"eos_token_id": None}, "generation_config": {"eos_token_id": []}}, [0]),
        ({"config": {"eos_token_id": [330, -1, 5]}}, [0, 5]),
        ({"config": {"text_config": {"eos_token_id": [321]}}}, [0, 321]),
        ({"tokenizer_config": {"eot_token": "<over>", "eom_token": {"content": "<|im_end|>"}}}, [0, 320, 321]),
        ({"tokenizer_config": {"eos_token": None}, "special_tokens_map": {"eos_token": "<over>"}}, [321]),
        (
            {"tokenizer_config": {"eos_token": "not there"}, "generation_config": {"eos_token_id": [321, 320]}},
            [320, 321, 322],
        ),
    ],
)
def test_each_place_that_names_end_tokens(files: dict[str, dict[str, Any]], expected: list[int], folder: Path) -> None:
    for name, changes in files.items():
        edit(folder / f"{name}.json", **changes)
    assert ends(folder) == expected


def test_gguf_has_the_first_of_several_and_keys_for_ends_of_turns(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", eos_token=None, eot_token="<over>")
    edit(folder / "config.json", eos_token_id=[320, 0])
    keys = convert_tokenizer(folder, 330).metadata
    assert (keys["tokenizer.ggml.eos_token_id"], keys["tokenizer.ggml.eot_token_id"]) == (320, 321)
    assert keys["lazyneuron.tokenizer.end_token_ids"] == [0, 320, 321]


def test_a_name_alone_ends_nothing(folder: Path) -> None:
    """libllama takes <|im_end|> for an end wherever it finds it."""
    assert 320 not in ends(folder)


@pytest.mark.parametrize("value", ["2", [2, "x"], 2.5, True, {"a": 1}])
def test_ids_that_are_none(value: Any, folder: Path) -> None:
    edit(folder / "generation_config.json", eos_token_id=value)
    with pytest.raises(
        UserError, match=r"generation_config.json`: `eos_token_id` is .*, expected the id of a token, or a list of ids"
    ):
        convert_tokenizer(folder, 330)
