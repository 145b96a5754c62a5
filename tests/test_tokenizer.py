"""Token ids through libllama and a converted vocabulary against sentencepiece, tokenizers and transformers."""

# ruff: noqa: RUF001 - the texts are meant to hold unusual characters

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Tokenizer

from convert.tokenizer.vocabulary import convert_tokenizer
from runtime.errors import UserError
from runtime.text.tokenizer import Tokenizer

BUNDLED = Path(__file__).parent.parent / "examples/tiny-relu-llama"
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PROSE = """\
The committee's report, which we'd awaited since 1984, didn't say that the 12,345 votes had been counted twice;
it said they'd been counted once, and that once was enough. "Naïve," said Mme Lefèvre, "mais très touché!"
    def area(radius: float) -> float:
        return 3.14159 * radius ** 2  # not exact
\tДобрый день, 日本語の文章と中文的句子, 안녕하세요, مرحبا, 🙂👍🏽 and 👩‍👩‍👧.
"""
TEXTS = [
    PROSE,
    "",
    " ",
    "   three leading spaces",
    "inner    runs  of   spaces   ",
    "\n\n\nlines\r\nand\ttabs\t\t \n ",
    "1 12 123 1234 12345678 3.14159",
    "it's we're they'll I'd YOU'VE o'clock",
    "Ünïcödé, e\u0301 (decomposed), \u00a0nbsp, \u200bzero width, \ufeffBOM",
    "for (i=0;i<n;++i){a[i]|=~b[i]&0xFF;} // ok\n\tif x != y: pass",
    "日本語 中文 한국어 русский עברית 🙂👍🏽👩‍👩‍👧 𝔘𝔫𝔦",
    "a\x00b \x00 \x7f \x1b[0m",
    "supercalifragilisticexpialidocious" * 3,
    "…—–“quoted”‘single’ €£¥ ½ ²",
]


def tokenizer_metadata(folder: Path, vocab_size: int) -> dict[str, Any]:
    return convert_tokenizer(folder, vocab_size).metadata


def write_vocabulary(metadata: dict[str, Any], path: Path) -> Path:
    """A GGUF file with a vocabulary and no tensors, as a converted model's file would have it."""
    writer = gguf.GGUFWriter(path, "lazyneuron")
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in metadata.items():
        adders.get(type(value), writer.add_array)(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def open_tokenizer(tmp_path: Path) -> Iterator[Callable[[Path, int], Tokenizer]]:
    """Convert the tokenizer in a folder and open it through libllama."""
    opened: list[Tokenizer] = []

    def get(folder: Path, vocab_size: int) -> Tokenizer:
        path = write_vocabulary(tokenizer_metadata(folder, vocab_size), tmp_path / f"vocabulary{len(opened)}.gguf")
        opened.append(Tokenizer(path))
        return opened[-1]

    yield get
    for tokenizer in opened:
        tokenizer.close()


Open = Callable[[Path, int], Tokenizer]


def train_sentencepiece(folder: Path, **options: Any) -> sentencepiece.SentencePieceProcessor:
    defaults = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PROSE.splitlines() * 5),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=500,
        hard_vocab_limit=False,
        remove_extra_whitespaces=False,
        minloglevel=2,
        **defaults,
        **options,
    )
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def train_byte_level(folder: Path, pre_tokenizer: Any, special: list[str], **model: Any) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE(**model))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(PROSE.splitlines(keepends=True) * 5, trainer)
    return tokenizer


def gpt2_style(folder: Path) -> tokenizers.Tokenizer:
    tokenizer = train_byte_level(folder, pre_tokenizers.ByteLevel(add_prefix_space=False), ["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def llama3_style(folder: Path) -> tokenizers.Tokenizer:
    split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated")
    steps = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    special = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer = train_byte_level(folder, steps, special, ignore_merges=True)
    bos = processors.TemplateProcessing(
        single="<|begin_of_text|> $A",
        special_tokens=[("<|begin_of_text|>", tokenizer.token_to_id("<|begin_of_text|>"))],
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), bos])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer


def falcon_style(folder: Path) -> tokenizers.Tokenizer:
    steps = [
        pre_tokenizers.Punctuation("contiguous"),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        pre_tokenizers.Digits(individual_digits=False),
        pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
    ]
    tokenizer = train_byte_level(folder, pre_tokenizers.Sequence(steps), ["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def jais2_style(folder: Path) -> tokenizers.Tokenizer:
    lengths = "".join(rf"\s{{{2**n}}}(?!\S)|" for n in range(9, 1, -1))
    pattern = LLAMA3_SPLIT.replace(r"|\s+(?!\S)|\s+", "|" + lengths + r"\s{1,2}(?!\S)|\s{1}")
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    tokenizer = train_byte_level(folder, pre_tokenizers.Sequence(steps), ["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def test_bundled_vocabulary_equals_sentencepiece(open_tokenizer: Open) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_file=str(BUNDLED / "tokenizer.model"))
    tokenizer = open_tokenizer(BUNDLED, 4096)
    for text in TEXTS:
        assert tokenizer.encode(text) == [1, *reference.encode(text)], repr(text)
        assert tokenizer.encode(text, add_special=False) == reference.encode(text), repr(text)
    assert (tokenizer.n_tokens, tokenizer.bos, tokenizer.eos, tokenizer.add_bos) == (4096, 1, 2, True)


@pytest.mark.parametrize("prefix", [True, False])
def test_trained_sentencepiece_equals_sentencepiece(prefix: bool, tmp_path: Path, open_tokenizer: Open) -> None:
    reference = train_sentencepiece(tmp_path, add_dummy_prefix=prefix, user_defined_symbols=["<tool>"])
    tokenizer = open_tokenizer(tmp_path, len(reference))
    for text in TEXTS:
        assert tokenizer.encode(text, add_special=False) == reference.encode(text), repr(text)
        assert tokenizer.decode(tokenizer.encode(text), skip_special=True) == text


@pytest.mark.parametrize("make", [gpt2_style, llama3_style, falcon_style, jais2_style])
def test_byte_level_bpe_equals_tokenizers(make: Any, tmp_path: Path, open_tokenizer: Open) -> None:
    reference = make(tmp_path)
    tokenizer = open_tokenizer(tmp_path, reference.get_vocab_size())
    for text in TEXTS:
        assert tokenizer.encode(text) == reference.encode(text).ids, repr(text)
        assert tokenizer.encode(text, add_special=False) == reference.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(tokenizer.encode(text), skip_special=True) == text


def test_llama3_special_tokens_in_a_text(tmp_path: Path, open_tokenizer: Open) -> None:
    reference = llama3_style(tmp_path)
    tokenizer = open_tokenizer(tmp_path, reference.get_vocab_size())
    text = "<|start_header_id|>user<|end_header_id|>\n\n It's 2024: <|eot_id|><|start_header_id|> <|eot_id|>x"
    ids = tokenizer.encode(text, add_special=False)
    assert ids == reference.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special=True) == "user\n\n It's 2024:  x"
    assert ids.count(reference.token_to_id("<|eot_id|>")) == 2
    assert reference.token_to_id("<|eot_id|>") not in tokenizer.encode(text, parse_special=False)
    assert tokenizer.decode(tokenizer.encode(text, parse_special=False), skip_special=True) == text
    assert (tokenizer.bos, tokenizer.eos) == (0, 3)
    assert [tokenizer.is_eog(i) for i in range(5)] == [False, False, False, True, False]


def test_added_tokens_that_are_not_special(tmp_path: Path, open_tokenizer: Open) -> None:
    reference = gpt2_style(tmp_path)
    reference.add_tokens([AddedToken("<think>", special=False), AddedToken("  ", special=False)])
    reference.save(str(tmp_path / "tokenizer.json"))
    tokenizer = open_tokenizer(tmp_path, reference.get_vocab_size())
    for text in ("so <think>hm</think> well", "two  spaces   three", "<think><|endoftext|>  "):
        assert tokenizer.encode(text) == reference.encode(text).ids, repr(text)


def test_opt_files_equal_transformers(tmp_path: Path, open_tokenizer: Open) -> None:
    trained = train_byte_level(tmp_path, pre_tokenizers.ByteLevel(add_prefix_space=False), ["<pad>", "</s>", "<unk>"])
    trained.model.save(str(tmp_path))
    specials = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    reference = GPT2Tokenizer.from_pretrained(tmp_path, **specials)
    config = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "add_prefix_space": False, **specials}
    added = {"0": {"content": "<pad>", "special": True}, "1": {"content": "</s>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"added_tokens_decoder": added}))
    (tmp_path / "tokenizer.json").unlink(missing_ok=True)
    tokenizer = open_tokenizer(tmp_path, trained.get_vocab_size())
    for text in [*TEXTS, "to be </s> or not<pad>"]:
        expected = reference.encode(text, add_special_tokens=False)
        assert tokenizer.encode(text, add_special=False) == expected, repr(text)
        assert tokenizer.encode(text) == [1, *expected]


def test_sentencepiece_special_tokens_are_parsed_on_demand(open_tokenizer: Open) -> None:
    tokenizer = open_tokenizer(BUNDLED, 4096)
    text = "one<s>two</s>"
    assert [i for i in tokenizer.encode(text, add_special=False) if i < 3] == [1, 2]
    assert [i for i in tokenizer.encode(text, add_special=False, parse_special=False) if i < 3] == []
    assert tokenizer.decode(tokenizer.encode(text, parse_special=False), skip_special=True) == text


def test_decode_round_trips(open_tokenizer: Open) -> None:
    tokenizer = open_tokenizer(BUNDLED, 4096)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text), skip_special=True) == text
        assert tokenizer.decode(tokenizer.encode(text)) == "<s>" + text
        ids = tokenizer.encode(text, add_special=False)
        assert b"".join(map(tokenizer.token_bytes, ids)).decode() == (" " + text if text else "")


def test_pieces_of_characters_and_of_special_tokens(open_tokenizer: Open) -> None:
    tokenizer = open_tokenizer(BUNDLED, 4096)
    assert tokenizer.token_bytes(tokenizer.encode("🙂")[-1]) == b"\x82"
    assert tokenizer.token_bytes(1) == b""
    assert tokenizer.token_bytes(1, special=True) == b"<s>"
    assert tokenizer.token_text(1) == "<s>"
    assert tokenizer.decode([tokenizer.encode("🙂")[-1]]) == "\ufffd"


def test_a_lone_surrogate_is_no_error(open_tokenizer: Open) -> None:
    tokenizer = open_tokenizer(BUNDLED, 4096)
    assert tokenizer.decode(tokenizer.encode("a\ud800b"), skip_special=True) == "a?b"


@pytest.mark.parametrize("token", [-1, 4096, 1 << 30])
def test_ids_outside_the_vocabulary_are_refused(token: int, open_tokenizer: Open) -> None:
    tokenizer = open_tokenizer(BUNDLED, 4096)
    for use in (tokenizer.token_bytes, tokenizer.token_text, tokenizer.is_eog, lambda i: tokenizer.decode([i])):
        with pytest.raises(UserError, match="expected 0 to 4095"):
            use(token)


def test_a_closed_tokenizer_says_so(open_tokenizer: Open) -> None:
    tokenizer = open_tokenizer(BUNDLED, 4096)
    tokenizer.close()
    tokenizer.close()
    with pytest.raises(UserError, match="the tokenizer is closed"):
        tokenizer.encode("x")


def test_files_without_a_vocabulary(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    no_vocabulary = write_vocabulary({"general.name": "nothing"}, tmp_path / "none.gguf")
    whole = write_vocabulary(tokenizer_metadata(BUNDLED, 4096), tmp_path / "whole.gguf")
    truncated = tmp_path / "truncated.gguf"
    shutil.copy(whole, truncated)
    with truncated.open("r+b") as file:
        file.truncate(5000)
    for path in (no_vocabulary, truncated, Path(__file__)):
        with pytest.raises(UserError, match=r"vocabulary|damaged GGUF file|expected a GGUF file") as caught:
            Tokenizer(path)
        assert path.name in caught.value.message
        assert "\n" not in caught.value.message
    with pytest.raises(FileNotFoundError):
        Tokenizer(tmp_path / "missing.gguf")
    assert capfd.readouterr() == ("", "")
