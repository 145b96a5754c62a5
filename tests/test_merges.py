"""SentencePiece tokenizers that are saved as tokenizer.json only: rebuilt from their merges, against the tokenizers library; and those that are refused."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Reference
from transformers import LlamaTokenizer
from transformers.convert_slow_tokenizer import generate_merges
from vocabularies import PROBES, TEXTS, converted, edit, train_sentencepiece

from convert.tokenizer.vocabulary import convert_tokenizer
from runtime.errors import UserError

BUNDLED = Path(__file__).parent.parent / "examples/tiny-relu-llama"
TURN = "<|turn|>"
PREPENDED = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
STYLES: dict[str, Callable[[Reference], None]] = {
    "prepend": lambda t: setattr(t, "normalizer", PREPENDED),
    "replace": lambda t: setattr(t, "normalizer", normalizers.Replace(" ", "▁")),
    "metaspace first": lambda t: setattr(
        t, "pre_tokenizer", pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    ),
    "metaspace always": lambda t: setattr(
        t, "pre_tokenizer", pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    ),
    "metaspace never": lambda t: setattr(
        t, "pre_tokenizer", pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    ),
}


def merges_of(model: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges as transformers makes them of a tokenizer.model."""
    read = sentencepiece.SentencePieceProcessor(model_file=str(model))
    vocab = {read.id_to_piece(i): i for i in range(len(read))}
    return vocab, generate_merges(
        vocab, {piece: read.get_score(i) for piece, i in vocab.items()}, ("<s>", "</s>", "<unk>")
    )


def texts(special: str) -> list[str]:
    draw = random.Random(5)
    words = (*TEXTS[:5], "\n", " ", "   ", "\u3000", "🙂", special, special)
    drawn = ["".join(draw.choices(words, k=6)) for _ in range(30)]
    return [
        *PROBES,
        special,
        f"{special}a",
        f"a{special}",
        f" {special}  {special} a",
        f"{special} ▁a",
        "aaaa" * 9,
        *drawn,
    ]


@pytest.mark.parametrize("legacy", [True, False])
def test_what_transformers_saves(legacy: bool, tmp_path: Path) -> None:
    vocab, merges = merges_of(BUNDLED / "tokenizer.model")
    saved = LlamaTokenizer(vocab=vocab, merges=merges, legacy=legacy, add_bos_token=True)
    saved.add_tokens([TURN], special_tokens=True)
    saved.add_tokens(["<think>"])
    saved.save_pretrained(tmp_path)
    assert not (tmp_path / "tokenizer.model").exists()
    reference = LlamaTokenizer.from_pretrained(tmp_path, legacy=legacy)
    with converted(tmp_path, 4100) as tokenizer:
        for text in [*texts(TURN), *texts("<think>")]:
            assert tokenizer.encode(text) == reference.encode(text), repr(text)
        assert tokenizer.decode(tokenizer.encode("Once upon a time"), skip_special=True) == "Once upon a time"


@pytest.mark.parametrize("style", STYLES)
def test_each_way_to_treat_spaces(style: str, tmp_path: Path) -> None:
    train_sentencepiece(tmp_path)
    vocab, merges = merges_of(tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer.model").unlink()
    reference = Reference(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    STYLES[style](reference)
    reference.add_special_tokens([AddedToken(t, normalized=False) for t in ("<unk>", "<s>", "</s>", TURN)])
    reference.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    reference.save(str(tmp_path / "tokenizer.json"))
    with converted(tmp_path, len(vocab) + 1) as tokenizer:
        for text in texts(TURN):
            assert tokenizer.encode(text) == reference.encode(text).ids, repr(text)
        once = style in ("metaspace first", "metaspace always")  # where no id tells whether a text began with a space
        for text in (text for text in PROBES if not (once and text.startswith(" "))):
            assert tokenizer.decode(tokenizer.encode(text), skip_special=True) == text


def train_here(folder: Path, **metaspace: Any) -> Reference:
    """One that the tokenizers library has trained: a single merge makes each token."""
    reference = Reference(models.BPE(byte_fallback=True, unk_token="<unk>"))
    reference.pre_tokenizer = pre_tokenizers.Metaspace(**metaspace)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    reference.train_from_iterator(TEXTS, trainer)
    values = json.loads(reference.to_str())
    values["added_tokens"] = values["added_tokens"][:3]  # bytes are none that a text may name
    (folder / "tokenizer.json").write_text(json.dumps(values))
    return Reference.from_str(json.dumps(values))


@pytest.mark.parametrize("split", [True, False])
def test_what_the_tokenizers_library_trains(split: bool, tmp_path: Path) -> None:
    reference = train_here(tmp_path, prepend_scheme="always", split=split)
    with converted(tmp_path, reference.get_vocab_size()) as tokenizer:
        for text in texts("</s>"):
            assert tokenizer.encode(text) == reference.encode(text).ids, repr(text)


def test_a_merge_that_scores_cannot_leave_out(tmp_path: Path) -> None:
    """`abc` is only made of `ab` and `c`, and in a text it is always `a` and `bc`."""
    vocab = {
        t: i
        for i, t in enumerate(
            ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *"abc", "bc", "ab", "abc"]
        )
    }
    reference = Reference(models.BPE(vocab=vocab, merges=[("b", "c"), ("a", "b"), ("ab", "c")], byte_fallback=True))
    reference.normalizer = PREPENDED
    assert reference.encode("abc").tokens[-2:] == ["a", "bc"]
    reference.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="no merge makes the token 'abc' of two others") as caught:
        convert_tokenizer(tmp_path, 300)
    assert "tokenizer.model" in caught.value.hint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalizer": {"type": "NFKC"}}, "with the normalizer .*NFKC"),
        ({"normalizer": {"type": "Prepend", "prepend": "_"}}, "with the normalizer .*Prepend"),
        (
            {"pre_tokenizer": {"type": "Metaspace", "replacement": "_", "prepend_scheme": "first", "split": False}},
            "pre-tokenizer .*'_'",
        ),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "pre-tokenizer .*Whitespace"),
        (
            {"model": {"type": "Unigram", "unk_id": 0, "byte_fallback": False, "vocab": [["<unk>", 0.0]]}},
            "a Unigram model",
        ),
        (
            {"model": {"type": "BPE", "byte_fallback": True, "vocab": {"a": 0}, "merges": []}},
            "without a token for each of the 256 bytes",
        ),
    ],
)
def test_other_models_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    train_here(tmp_path)
    edit(tmp_path / "tokenizer.json", **changes)
    with pytest.raises(UserError, match=message):
        convert_tokenizer(tmp_path, 420)


def test_a_tokenizer_json_that_splits_words_and_has_tokens_across_them(tmp_path: Path) -> None:
    train_here(tmp_path, split=False)
    values = json.loads((tmp_path / "tokenizer.json").read_text())
    values["pre_tokenizer"]["split"] = True
    assert any("▁" in text[1:] for text in values["model"]["vocab"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="Metaspace without split"):
        convert_tokenizer(tmp_path, 420)
