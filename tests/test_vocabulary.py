"""Vocabularies that libllama's loader or tokenizers would end the process on: one line instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vocabularies import write

from runtime.errors import UserError
from runtime.text.tokenizer import Tokenizer

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPM: dict[str, Any] = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *BYTES, "a", "▁"],
    "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, 1, 1],
    "tokenizer.ggml.scores": [0.0] * 261,
    "tokenizer.ggml.add_bos_token": True,
}
BPE: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["a", "b", "ab", "<e>"],
    "tokenizer.ggml.token_type": [1, 1, 1, 3],
    "tokenizer.ggml.merges": ["a b"],
}


def key(name: str, value: Any) -> dict[str, Any]:
    return {f"tokenizer.ggml.{name}": value}


@pytest.mark.parametrize("base", [SPM, BPE], ids=["llama", "gpt2"])
def test_a_sound_vocabulary_is_read(base: dict[str, Any], tmp_path: Path) -> None:
    with Tokenizer(write(base, tmp_path / "v.gguf")) as tokenizer:
        assert tokenizer.n_tokens == len(base["tokenizer.ggml.tokens"])
        assert tokenizer.encode("ab")


DAMAGES = {
    "two tokens with one text": (
        BPE,
        key("tokens", ["a", "b", "a", "<e>"]),
        "tokens 0 and 2 of its vocabulary are both 'a'",
    ),
    "the name of an empty one": (BPE, key("tokens", ["a", "", "[EMPTY_1]", "<e>"]), r"tokens 1 and 2 .* '\[EMPTY_1\]'"),
    "one text up to NUL": (BPE, key("tokens", ["a", "b\0c", "b\0d", "<e>"]), "tokens 1 and 2 .* 'b'"),
    "no tokens": (BPE, key("tokens", None), "no tokens in its vocabulary"),
    "tokens that are no texts": (BPE, key("tokens", [1, 2, 3, 4]), "no tokens in its vocabulary"),
    "one token fewer than rows": (BPE, {"lazyneuron.vocab_size": 5}, "4 tokens in its vocabulary, expected 5"),
    "an unknown kind": (BPE, key("model", "rwkv"), "the kind `rwkv`, expected one of llama, gpt2"),
    "a kind that asserts texts' ends": (BPE, key("model", "bert"), "the kind `bert`"),
    "no kind": (BPE, key("model", None), "has no `tokenizer.ggml.model`"),
    "no merges": (BPE, key("merges", None), "no `tokenizer.ggml.merges`"),
    "merges of numbers": (BPE, key("merges", [1]), "`tokenizer.ggml.merges` of its vocabulary holds no texts"),
    "a merge of one part": (BPE, key("merges", ["a b", "ab"]), "the merge 'ab' of its vocabulary has no two parts"),
    "no types": (BPE, key("token_type", None), "no `tokenizer.ggml.token_type`"),
    "too few types": (BPE, key("token_type", [1, 1, 1]), "3 values in `tokenizer.ggml.token_type`"),
    "types that are no array": (
        BPE,
        key("token_type", 1),
        "`tokenizer.ggml.token_type` of its vocabulary holds no numbers",
    ),
    "no scores": (SPM, key("scores", None), "no `tokenizer.ggml.scores`"),
    "too few scores": (SPM, key("scores", [0.0]), "1 values in `tokenizer.ggml.scores`"),
    "a score that is no number": (SPM, key("scores", [float("nan")] * 261), "a score of its vocabulary is no number"),
    "a missing byte": (SPM, key("tokens", ["<unk>", "<s>", "</s>", "x", *BYTES[1:], "a", "▁"]), "no token `<0x00>`"),
    "a start token beyond it": (BPE, key("bos_token_id", 4), "`tokenizer.ggml.bos_token_id` is 4, expected 0 to 3"),
    "an end token beyond it": (
        BPE,
        {"lazyneuron.tokenizer.end_token_ids": [1, 9]},
        "end_token_ids` is .*, expected 0 to 3",
    ),
    "end tokens of a wrong type": (BPE, {"lazyneuron.tokenizer.end_token_ids": [1.5]}, "expected ids of tokens"),
    "a start token that is not there": (BPE, key("add_bos_token", True), "adds a bos token to texts, and has none"),
    "an end token that is not there": (BPE, key("add_eos_token", True), "adds a eos token to texts, and has none"),
    "a rule of another version": (BPE, {"lazyneuron.tokenizer.space_prefix": "last"}, "space_prefix `last`"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_vocabulary_is_refused_with_one_line(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base, change, message = DAMAGES[name]
    metadata = {k: v for k, v in (base | change).items() if v is not None}
    path = write(metadata, tmp_path / "v.gguf")
    with pytest.raises(UserError, match=message) as caught:
        Tokenizer(path)
    assert "\n" not in caught.value.message and "v.gguf" in caught.value.message and caught.value.hint
    assert capfd.readouterr() == ("", "")


def test_names_of_models_change_nothing(tmp_path: Path) -> None:
    """libllama lets special tokens of models called phi-3 take the white space behind them."""
    usual, named = (
        Tokenizer(write(SPM | {"general.name": name}, tmp_path / f"{name}.gguf")) for name in ("other", "phi-3-mini")
    )
    with usual, named:
        assert named.encode("</s>  a") == usual.encode("</s>  a")


def test_keys_at_hand_are_not_read_again(tmp_path: Path) -> None:
    path = write(BPE, tmp_path / "v.gguf")
    metadata = BPE | {"tokenizer.ggml.token_type": np.array([1, 1, 1, 3]), "lazyneuron.tokenizer.end_token_ids": [2]}
    with Tokenizer(path, metadata) as tokenizer:
        assert tokenizer.end_ids == [2]
