"""Small tokenizers trained on the spot, and their ids as a conversion gives them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Tokenizer as Reference
from tokenizers import decoders, models, pre_tokenizers, trainers

from convert.tokenizer.vocabulary import convert_tokenizer
from runtime.model_file.writer import write_gguf
from runtime.text.tokenizer import Tokenizer

TEXTS = [
    "The quick brown fox's 12345 jumps",
    "over the lazy dog",
    "naïve café 日本語",
    "We've got 42 it'll",
    "<a> b",
] * 20
PROBES = ("a", " a", "  a b ", "The lazy dog's 12\n\n", "\n a", "naïve 日本 🙂", "")


def train_sentencepiece(folder: Path, **options: Any) -> sentencepiece.SentencePieceProcessor:
    """A SentencePiece BPE of some 340 pieces (0 <unk>, 1 <s>, 2 </s>) as tokenizer.model."""
    fixed = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "vocab_size": 340}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_prefix=str(folder / "tokenizer"),
        minloglevel=2,
        hard_vocab_limit=False,
        **{"remove_extra_whitespaces": False, **fixed, **options},
    )
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def train_bytes(folder: Path, pre: Any = None, **model: Any) -> Reference:
    """A byte-level BPE of 320 tokens (0 is <|end|>) as tokenizer.json."""
    tokenizer = Reference(models.BPE(**model))
    tokenizer.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file, which need not be there."""
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))


def write(metadata: dict[str, Any], path: Path) -> Path:
    """A GGUF file with these keys and no tensors."""
    write_gguf(path, metadata, [])
    return path


@contextmanager
def converted(folder: Path, vocab_size: int) -> Iterator[Tokenizer]:
    """The tokenizer in `folder` as the runtime reads it after a conversion."""
    with Tokenizer(write(convert_tokenizer(folder, vocab_size).metadata, folder / "vocabulary.gguf")) as tokenizer:
        yield tokenizer
