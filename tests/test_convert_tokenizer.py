"""Tokenizer files as GGUF keys: vocabularies against sentencepiece and tokenizers, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from checkpoints import TOKENIZER
from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Reference
from vocabularies import write

from convert.tokenizer.vocabulary import convert_tokenizer
from runtime.errors import UserError
from runtime.text.tokenizer import Tokenizer

TEXT = ["The quick brown fox's 12345 jumps", "over the lazy dog", "naïve café 日本語", "We've got 42 it'll"] * 20
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


@pytest.fixture
def spm_folder(tmp_path: Path) -> Path:
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, tmp_path / name)
    return tmp_path


def tokenizer_metadata(folder: Path, vocab_size: int) -> dict[str, Any]:
    return convert_tokenizer(folder, vocab_size).metadata


def ggml(metadata: dict[str, Any], key: str) -> Any:
    return metadata[f"tokenizer.ggml.{key}"]


def update_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))


def train_spm(folder: Path, **options: Any) -> None:
    options = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", **options}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=340 if options["byte_fallback"] else 60,
        minloglevel=2,
        hard_vocab_limit=False,
        **{"remove_extra_whitespaces": False, **options},
    )


# As in the tokenizer.json of Llama 3 and Qwen2.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

# As in libllama, whose spelling of the first alternatives is another.
JAIS2 = (
    LLAMA3[: LLAMA3.rindex(r"\s+(?!\S)")]
    + "".join(rf"\s{{{2**n}}}(?!\S)|" for n in range(9, 1, -1))
    + r"\s{1,2}(?!\S)|\s{1}"
)

PRE_TOKENIZER_JSON = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "llama-bpe": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
    "dbrx": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
    "qwen2": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "jais-2": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(JAIS2), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
    "falcon": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Punctuation("contiguous"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            pre_tokenizers.Digits(individual_digits=False),
            pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
        ]
    ),
}


def train_bpe(folder: Path, pre: Any, ignore_merges: bool = False) -> Reference:
    """A byte-level BPE tokenizer with one special token, saved as tokenizer.json."""
    tokenizer = Reference(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def test_sentencepiece_vocabulary(spm_folder: Path) -> None:
    metadata = tokenizer_metadata(spm_folder, 4100)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(spm_folder / "tokenizer.model"))
    ids = range(len(reference))
    assert ggml(metadata, "model") == "llama"
    assert ggml(metadata, "tokens") == [reference.id_to_piece(i) for i in ids] + [
        f"[PAD{i}]" for i in range(4096, 4100)
    ]
    assert ggml(metadata, "scores")[:4096] == [reference.get_score(i) for i in ids]
    types = ggml(metadata, "token_type")
    assert [t == BYTE for t in types[:4096]] == [reference.is_byte(i) for i in ids]
    assert [t == CONTROL for t in types[:4096]] == [reference.is_control(i) for i in ids]
    assert [t == UNKNOWN for t in types[:4096]] == [reference.is_unknown(i) for i in ids]
    assert types[4096:] == [UNUSED] * 4
    assert (ggml(metadata, "bos_token_id"), ggml(metadata, "eos_token_id"), ggml(metadata, "unknown_token_id")) == (
        1,
        2,
        0,
    )
    assert (ggml(metadata, "add_bos_token"), ggml(metadata, "add_eos_token")) == (True, False)


@pytest.mark.parametrize("prefix", [True, False])
def test_space_prefix_and_user_defined_pieces(prefix: bool, tmp_path: Path) -> None:
    train_spm(tmp_path, add_dummy_prefix=prefix, user_defined_symbols=["<tool>"])
    metadata = tokenizer_metadata(tmp_path, 400)
    assert ggml(metadata, "add_space_prefix") is False  # libllama would put one behind the user-defined piece too
    assert ("lazyneuron.tokenizer.space_prefix" in metadata) is prefix
    assert ggml(metadata, "token_type")[ggml(metadata, "tokens").index("<tool>")] == USER_DEFINED


def test_added_tokens_from_every_place(spm_folder: Path) -> None:
    update_json(spm_folder / "added_tokens.json", **{"<one>": 4096})
    update_json(spm_folder / "tokenizer.json", added_tokens=[{"id": 4097, "content": "<two>", "special": True}])
    decoder = {"0": {"content": "<unk>", "special": True}, "4099": {"content": "<three>", "special": False}}
    update_json(spm_folder / "tokenizer_config.json", added_tokens_decoder=decoder, pad_token={"content": "<two>"})
    metadata = tokenizer_metadata(spm_folder, 4101)
    assert ggml(metadata, "tokens")[4096:] == ["<one>", "<two>", "[PAD4098]", "<three>", "[PAD4100]"]
    assert ggml(metadata, "token_type")[4096:] == [USER_DEFINED, CONTROL, UNUSED, USER_DEFINED, UNUSED]
    assert ggml(metadata, "token_type")[0] == UNKNOWN
    assert ggml(metadata, "padding_token_id") == 4097


@pytest.mark.parametrize("name", PRE_TOKENIZER_JSON)
def test_byte_level_vocabulary_and_pre_tokenizer(name: str, tmp_path: Path) -> None:
    tokenizer = train_bpe(tmp_path, PRE_TOKENIZER_JSON[name], ignore_merges=name == "llama-bpe")
    metadata = tokenizer_metadata(tmp_path, 330)
    assert ggml(metadata, "model") == "gpt2"
    assert ggml(metadata, "pre") == name
    size = tokenizer.get_vocab_size()
    assert ggml(metadata, "tokens")[:size] == [tokenizer.id_to_token(i) for i in range(size)]
    assert ggml(metadata, "token_type") == [CONTROL] + [NORMAL] * (size - 1) + [UNUSED] * (330 - size)
    merges = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"]
    assert ggml(metadata, "merges") == [" ".join(pair) for pair in merges]
    assert ggml(metadata, "add_bos_token") is False


def test_vocab_and_merges_equal_tokenizer_json(tmp_path: Path) -> None:
    tokenizer = train_bpe(tmp_path, PRE_TOKENIZER_JSON["gpt-2"])
    expected = tokenizer_metadata(tmp_path, 330)
    (tmp_path / "tokenizer.json").unlink()
    tokenizer.model.save(str(tmp_path))
    decoder = {"0": {"content": "<|end|>", "special": True}}
    update_json(tmp_path / "tokenizer_config.json", added_tokens_decoder=decoder)
    assert tokenizer_metadata(tmp_path, 330) == expected


def test_opts_beginning_of_text(tmp_path: Path) -> None:
    train_bpe(tmp_path, PRE_TOKENIZER_JSON["gpt-2"]).model.save(str(tmp_path))
    (tmp_path / "tokenizer.json").unlink()
    update_json(tmp_path / "tokenizer_config.json", bos_token="<|end|>", eos_token="<|end|>", add_bos_token=True)
    update_json(tmp_path / "config.json", bos_token_id=7, pad_token_id=1)
    metadata = tokenizer_metadata(tmp_path, 330)
    assert (ggml(metadata, "bos_token_id"), ggml(metadata, "eos_token_id"), ggml(metadata, "padding_token_id")) == (
        0,
        0,
        1,
    )
    assert ggml(metadata, "add_bos_token") is True


def test_a_template_that_starts_with_a_special_token_adds_it(tmp_path: Path) -> None:
    tokenizer = train_bpe(tmp_path, PRE_TOKENIZER_JSON["gpt-2"])
    template = processors.TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", 0)])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    metadata = tokenizer_metadata(tmp_path, 330)
    assert (ggml(metadata, "add_bos_token"), ggml(metadata, "bos_token_id")) == (True, 0)


def test_where_a_chat_template_may_stand(spm_folder: Path) -> None:
    def found() -> str | None:
        return tokenizer_metadata(spm_folder, 4096).get("tokenizer.chat_template")

    assert found() is None
    update_json(spm_folder / "chat_template.json", chat_template="of a processor")
    assert found() == "of a processor"
    templates = [{"name": "tools", "template": "no"}, {"name": "default", "template": "yes"}]
    update_json(spm_folder / "tokenizer_config.json", chat_template=templates)
    assert found() == "yes"
    update_json(spm_folder / "tokenizer_config.json", chat_template="{{ messages }}")
    assert found() == "{{ messages }}"
    (spm_folder / "additional_chat_templates").mkdir()
    (spm_folder / "chat_template.jinja").write_text("own file")
    (spm_folder / "additional_chat_templates/tools.jinja").write_text("tools")
    assert found() == "own file"


@pytest.mark.parametrize("place", ["list", "folder"])
def test_named_chat_templates_without_a_default_are_told(place: str, spm_folder: Path) -> None:
    if place == "list":
        templates = [{"name": name, "template": "no"} for name in ("tool_use", "rag")]
        update_json(spm_folder / "tokenizer_config.json", chat_template=templates)
    else:
        (spm_folder / "additional_chat_templates").mkdir()
        for name in ("tool_use", "rag"):
            (spm_folder / f"additional_chat_templates/{name}.jinja").write_text("no")
    found = convert_tokenizer(spm_folder, 4096)
    assert "tokenizer.chat_template" not in found.metadata
    assert found.notes == ("none of the chat templates (rag, tool_use) is the default: the file has none",)


def test_a_special_token_that_only_the_model_names(tmp_path: Path) -> None:
    """config.json's ids are for generating: templates do not see them, as in transformers."""
    train_bpe(tmp_path, PRE_TOKENIZER_JSON["gpt-2"])
    update_json(tmp_path / "config.json", bos_token_id=0, eos_token_id=0)
    update_json(
        tmp_path / "tokenizer_config.json", bos_token=None, eos_token="<|end|>", chat_template="{{ bos_token }}"
    )
    metadata = tokenizer_metadata(tmp_path, 330)
    assert ggml(metadata, "bos_token_id") == 0
    with Tokenizer(write(metadata, tmp_path / "v.gguf")) as tokenizer:
        assert tokenizer.special_tokens(metadata["lazyneuron.chat_template.special_tokens"]) == {"eos_token": "<|end|>"}


def test_special_tokens_that_templates_name(spm_folder: Path, tmp_path: Path) -> None:
    extra = {
        "additional_special_tokens": ["<one>", {"content": "<two>"}],
        "image_token": "<image>",
        "pad_token": "</s>",
    }
    update_json(spm_folder / "tokenizer_config.json", chat_template="{{ pad_token }}", **extra)
    metadata = tokenizer_metadata(spm_folder, 4096)
    with Tokenizer(write(metadata, tmp_path / "v.gguf")) as tokenizer:
        found = tokenizer.special_tokens(metadata["lazyneuron.chat_template.special_tokens"])
        assert tokenizer.special_tokens() == {"bos_token": "<s>", "eos_token": "</s>"}
        with pytest.raises(UserError, match=r"its special tokens are '{', expected a JSON object"):
            tokenizer.special_tokens("{")
    named = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "</s>",
        "image_token": "<image>",
    }
    assert found == named | {"additional_special_tokens": ["<one>", "<two>"]}


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"model_type": "unigram"}, "a unigram, word or character model"),
        ({"normalization_rule_name": "nmt_nfkc"}, "rewrites characters"),
        ({"remove_extra_whitespaces": True}, "removes extra spaces"),
        ({"byte_fallback": False}, "without byte fallback"),
    ],
)
def test_sentencepiece_models_that_are_refused(options: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    train_spm(tmp_path, **options)
    with pytest.raises(UserError, match=complaint):
        tokenizer_metadata(tmp_path, 400)


@pytest.mark.parametrize("size", [0, 1, 1000, 63000])
def test_a_damaged_sentencepiece_model_is_refused(size: int, spm_folder: Path) -> None:
    path = spm_folder / "tokenizer.model"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=r"tokenizer.model`: (not a SentencePiece model|the SentencePiece model is)"):
        tokenizer_metadata(spm_folder, 4096)


@pytest.mark.parametrize(
    ("part", "change", "complaint"),
    [
        ("model", {"byte_fallback": True}, "byte fallback without a token for each of the 256 bytes"),
        ("model", {"type": "WordPiece"}, "a WordPiece model, expected BPE"),
        ("model", {"end_of_word_suffix": "</w>"}, "has a `end_of_word_suffix`"),
        ("model", {"ignore_merges": True}, "unknown pre-tokenizer"),
        ("pre_tokenizer", {"add_prefix_space": True}, "unknown pre-tokenizer"),
        ("pre_tokenizer", {"type": "Whitespace"}, '"type": "Whitespace"'),
        ("normalizer", {"type": "Lowercase"}, "normalizer Lowercase"),
        ("model", {"vocab": 5}, "`vocab` is 5, expected an object"),
        ("model", {"merges": None}, "no `merges`"),
        ("model", {"vocab": {"a": "b"}}, "malformed"),
    ],
)
def test_tokenizer_json_that_is_refused(part: str, change: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    train_bpe(tmp_path, PRE_TOKENIZER_JSON["gpt-2"])
    values = json.loads((tmp_path / "tokenizer.json").read_text())
    update_json(tmp_path / "tokenizer.json", **{part: (values[part] or {}) | change})
    with pytest.raises(UserError) as error:
        tokenizer_metadata(tmp_path, 400)
    assert complaint in error.value.message


def test_no_tokenizer_and_too_many_tokens(spm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(UserError, match="no tokenizer in it"):
        tokenizer_metadata(tmp_path_factory.mktemp("empty"), 100)
    with pytest.raises(UserError, match="token id 4095, expected ids below `vocab_size` 4095"):
        tokenizer_metadata(spm_folder, 4095)
