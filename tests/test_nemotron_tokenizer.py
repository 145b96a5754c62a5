"""A tokenizer as Nemotron-H and Nemotron 3 have it: ids, the tokens that end a text, and its chat template.

The vocabulary is made here. TOKENIZER_TEXTS=20000 compares as many texts in place of the usual number.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Reference
from transformers import PreTrainedTokenizerFast
from vocabularies import converted, edit

from convert.tokenizer.vocabulary import convert_tokenizer
from runtime.text.chat_template import render

EXAMPLES = Path(__file__).parent.parent / "examples"
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
SIZE = 2048
ROWS = SIZE + 8  # of the embeddings: as in the published files, more than there are tokens
WHOLE = [" squaredReLU", "MambaTwo", "\u65e5\u672c"]  # in the vocabulary, and made by no merge
# Thinking blocks of earlier turns are left out, and an empty one stands for no thinking.
TEMPLATE = """\
{%- set thinks = enable_thinking if enable_thinking is defined else true -%}
{%- if messages[0].role == 'system' -%}
{{- '<|im_start|>system\\n' + messages[0].content | trim + '<|im_end|>\\n' -}}
{%- set rest = messages[1:] -%}
{%- else -%}{%- set rest = messages -%}{%- endif -%}
{%- set last = namespace(user=-1) -%}
{%- for m in rest -%}{%- if m['role'] == 'user' -%}{%- set last.user = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in rest -%}
{%- set text = m.content -%}
{%- if m.role == 'assistant' and '</think>' in text and loop.index0 < last.user -%}
{%- set text = '<think></think>' + text.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{{- '<|im_start|>' ~ m.role ~ '\\n' ~ text ~ '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' + ('<think>\\n' if thinks else '<think></think>') -}}
{%- endif -%}
"""
CHAT = [
    {"role": "system", "content": " Answer briefly.\n"},
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "<think>\nfour, surely\n</think>\n\n4"},
    {"role": "user", "content": "And é 🙂?"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.json with Llama 3's split, `ignore_merges`, BOS before texts, and several end tokens."""
    folder = tmp_path_factory.mktemp("nemotron")
    tokenizer = Reference(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE - len(WHOLE), special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((EXAMPLES / "heldout.txt").read_text().splitlines(keepends=True), trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]),
        ]
    )
    values = json.loads(tokenizer.to_str())
    vocab = values["model"]["vocab"]
    vocab |= {spelled(text): len(vocab) + i for i, text in enumerate(WHOLE)}
    assert len(vocab) == SIZE
    (folder / "tokenizer.json").write_text(json.dumps(values))
    edit(
        folder / "tokenizer_config.json",
        tokenizer_class="PreTrainedTokenizerFast",
        bos_token="<s>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
        chat_template=TEMPLATE,
    )
    edit(folder / "config.json", eos_token_id=2, bos_token_id=1, pad_token_id=0)
    edit(folder / "generation_config.json", eos_token_id=[2, 6])
    return folder


def spelled(text: str) -> str:
    """A text in the alphabet of bytes."""
    return "".join(piece for piece, _ in pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str(text))


def texts(n: int) -> Iterator[str]:
    """Pieces of English, of code, of many scripts, of white space and digits, with special tokens here and there."""
    draw = random.Random(18)
    english = (EXAMPLES / "heldout.txt").read_text()
    code = Path(__file__).read_text()
    scripts = ((0x20, 0x250), (0x370, 0x600), (0x900, 0xE00), (0x3040, 0x3100), (0x4E00, 0x9FA0), (0xAC00, 0xD7A0))
    odd = ("e\u0301", "camelCaseÉ", "'LL", "don't", "\r\n", "\n\n", "   ", "\t", "\u00a0", "12345", "½", "🙂", "٣٤٥")
    for _ in range(n):
        source = english if draw.random() < 0.7 else code
        at = draw.randrange(len(source))
        parts = [source[at : at + draw.randrange(60)]]
        for _ in range(draw.randrange(4)):
            low, high = draw.choice(scripts)
            letters = "".join(chr(draw.randrange(low, high)) for _ in range(draw.randrange(6)))
            parts.append(draw.choice((letters, draw.choice(odd), draw.choice(SPECIAL), draw.choice(WHOLE))))
        draw.shuffle(parts)
        yield draw.choice(("", " ")).join(parts)


def test_ids_equal_those_of_the_tokenizers_library(folder: Path) -> None:
    n = int(os.environ.get("TOKENIZER_TEXTS", "1500"))
    reference = Reference.from_file(str(folder / "tokenizer.json"))
    seen: set[int] = set()
    with converted(folder, ROWS) as tokenizer:
        for text in texts(n):
            right = reference.encode(text).ids
            assert tokenizer.encode(text) == right, ascii(text)
            seen.update(right)
    assert right[0] == 1
    assert len(seen) > SIZE // 2
    assert seen >= {reference.token_to_id(spelled(text)) for text in WHOLE}


def test_a_vocabulary_without_ignore_merges_has_another_name(folder: Path, tmp_path: Path) -> None:
    """What no merge makes is then no token of a text: the ids would be others."""
    values = json.loads((folder / "tokenizer.json").read_text())
    values["model"]["ignore_merges"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    names = [convert_tokenizer(where, ROWS).metadata["tokenizer.ggml.pre"] for where in (folder, tmp_path)]
    assert names == ["llama-bpe", "dbrx"]
    with converted(folder, ROWS) as whole, converted(tmp_path, ROWS) as merged:
        assert len(whole.encode("MambaTwo", add_special=False)) < len(merged.encode("MambaTwo", add_special=False))


def test_each_token_that_ends_a_turn_or_a_text_is_kept(folder: Path) -> None:
    metadata = convert_tokenizer(folder, ROWS).metadata
    assert metadata["tokenizer.ggml.eos_token_id"] == 6
    with converted(folder, ROWS) as tokenizer:
        assert tokenizer.end_ids == [2, 6]
        assert tokenizer.encode("a")[0] == 1


@pytest.mark.parametrize("options", [{}, {"enable_thinking": False}])
def test_the_template_with_thinking_blocks_is_rendered_as_transformers_does(
    folder: Path, options: dict[str, Any]
) -> None:
    template = convert_tokenizer(folder, ROWS).metadata["tokenizer.chat_template"]
    reference: Any = PreTrainedTokenizerFast.from_pretrained(folder)
    expected = reference.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True, **options)
    found = render(template, CHAT, {"bos_token": "<s>", "eos_token": "<|im_end|>"}, values=options)
    assert found == expected
    assert "surely" not in found
    assert found.endswith("<think></think>" if options else "<think>\n")
    with converted(folder, ROWS) as tokenizer:
        ids = tokenizer.encode(found, add_special=False)
        assert ids == reference(found, add_special_tokens=False).input_ids
        assert ids.count(5) == 5  # each turn begins with one token
