"""Added and special tokens of every form, in texts, against the tokenizers library and transformers; and which are left out or refused."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Reference
from transformers import AutoTokenizer, LlamaTokenizer
from vocabularies import PROBES, converted, edit, train_bytes, train_sentencepiece

from convert.tokenizer.vocabulary import convert_tokenizer
from runtime.errors import UserError
from runtime.text.text_rules import TextRules

TURN = "<|turn|>"


def around(token: str) -> list[str]:
    spaces = (
        f"{token}\n\nriver",
        f"{token} river",
        f"a \t{token}b",
        f"\u3000{token}\u00a0{token}  ",
        f"{token}\x1c{token}\x85a",
    )
    return [*PROBES, token, token * 2, f"a{token}b", f"The {token} dog {token}", *spaces]


@pytest.mark.parametrize("flags", [{"lstrip": True}, {"rstrip": True}, {"lstrip": True, "rstrip": True}])
@pytest.mark.parametrize("special", [True, False])
def test_tokens_that_take_white_space(special: bool, flags: dict[str, bool], tmp_path: Path) -> None:
    reference = train_bytes(tmp_path)
    reference.add_tokens([AddedToken(TURN, special=special, normalized=False, **flags)])
    reference.save(str(tmp_path / "tokenizer.json"))
    with converted(tmp_path, 330) as tokenizer:
        for text in around(TURN):
            assert tokenizer.encode(text) == reference.encode(text).ids, repr(text)
        assert tokenizer.encode(f"a {TURN} b", parse_special=False).count(320) == (0 if special else 1)


def test_tokens_that_take_white_space_beside_a_sentencepiece_model(tmp_path: Path) -> None:
    model = train_sentencepiece(tmp_path)
    entry = {"content": TURN, "special": True, "rstrip": True}
    edit(tmp_path / "tokenizer_config.json", legacy=False, added_tokens_decoder={str(len(model)): entry})
    with converted(tmp_path, 400) as tokenizer:
        inside = model.encode("\na")[2:]  # no piece holds a newline: what follows its byte is as at no text's beginning
        assert tokenizer.encode(f"The{TURN}  a", add_special=False) == [*model.encode("The"), len(model), *inside]


def test_a_token_that_is_a_single_word_is_refused(tmp_path: Path) -> None:
    reference = train_bytes(tmp_path)
    reference.add_tokens([AddedToken("zebra", single_word=True, normalized=False)])
    reference.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"the text '.*zebra.*' is \[.*320.*\] in libllama, expected \[") as caught:
        convert_tokenizer(tmp_path, 330)
    assert "docs/families.md" in caught.value.hint


def test_a_token_that_is_looked_for_in_normalized_text(tmp_path: Path) -> None:
    """With Prepend the library looks for ▁<tool>, which most texts do not hold."""
    from test_merges import merges_of

    train_sentencepiece(tmp_path)
    vocab, merges = merges_of(tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer.model").unlink()
    saved = LlamaTokenizer(vocab=vocab, merges=merges)
    saved.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    saved.backend_tokenizer.pre_tokenizer = None
    saved.backend_tokenizer.add_tokens([AddedToken("<tool>", normalized=True)])
    saved.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"the text '.*<tool>.*' is .* in libllama, expected"):
        convert_tokenizer(tmp_path, 400)


def test_two_tokens_with_one_text(tmp_path: Path) -> None:
    reference = train_bytes(tmp_path)
    added = {"321": {"content": "the", "special": False}, "322": {"content": "<|end|>", "special": True}}
    taken = {"323": {"content": "[PAD324]", "special": True}}  # the name that the next filler would have
    edit(tmp_path / "tokenizer_config.json", added_tokens_decoder=added | taken)
    found = convert_tokenizer(tmp_path, 326)
    assert [note[:33] for note in found.notes] == [
        "added token 321 left out: its tex",
        "added token 322 left out: its tex",
    ]
    tokens = found.metadata["tokenizer.ggml.tokens"]
    assert tokens[320:] == ["[PAD320]", "[PAD321]", "[PAD322]", "[PAD324]", "[[PAD324]]", "[PAD325]"]
    with converted(tmp_path, 326) as tokenizer:
        for text in (*PROBES, "the <|end|>", "others"):
            assert tokenizer.encode(text) == reference.encode(text).ids, repr(text)


@pytest.mark.parametrize("place", ["added_tokens.json", "tokenizer.json", "tokenizer_config.json"])
def test_added_tokens_beyond_the_embeddings(place: str, tmp_path: Path) -> None:
    reference = train_bytes(tmp_path)
    entry = {"content": "<pad>", "special": True}
    if place == "added_tokens.json":
        edit(tmp_path / place, **{"<pad>": 320})
    elif place == "tokenizer.json":
        values = json.loads((tmp_path / place).read_text())
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        edit(tmp_path / place, added_tokens=[*values["added_tokens"], entry | flags | {"id": 320}])
    else:
        edit(tmp_path / place, added_tokens_decoder={"320": entry}, pad_token="<pad>")
    found = convert_tokenizer(tmp_path, 320)
    assert found.notes == ("added tokens left out, for the model has 320 rows of embeddings: `<pad>` (320)",)
    assert len(found.metadata["tokenizer.ggml.tokens"]) == 320
    with converted(tmp_path, 320) as tokenizer:
        assert tokenizer.encode("a<pad>") == reference.encode("a<pad>").ids


def test_a_special_token_that_is_only_named(tmp_path: Path) -> None:
    """As <|endoftext|> in GPT-2's files: transformers matches it as a whole all the same."""
    reference = train_bytes(tmp_path)
    values = json.loads((tmp_path / "tokenizer.json").read_text())
    edit(tmp_path / "tokenizer.json", added_tokens=[])
    edit(tmp_path / "special_tokens_map.json", eos_token={"content": "<|end|>", "lstrip": False, "rstrip": True})
    reference = Reference.from_str(json.dumps(values))
    with converted(tmp_path, 320) as tokenizer:
        assert tokenizer.encode("a<|end|>b") == reference.encode("a<|end|>b").ids
        assert tokenizer.encode("<|end|>  b") == reference.encode("<|end|>b").ids
        assert tokenizer.is_eog(0)


def test_tokens_without_a_text_and_with_nul(tmp_path: Path) -> None:
    train_bytes(tmp_path)
    edit(tmp_path / "added_tokens.json", **{"": 320})
    assert convert_tokenizer(tmp_path, 330).metadata["tokenizer.ggml.tokens"][320] == "[PAD320]"
    edit(tmp_path / "added_tokens.json", **{"a\0b": 321})
    with pytest.raises(UserError, match=r"token 321 is 'a.x00b', expected a text without NUL"):
        convert_tokenizer(tmp_path, 330)


@pytest.mark.parametrize(
    "entry",
    [{"id": "320", "content": "x"}, {"id": True, "content": "x"}, {"content": "x"}, {"id": -1, "content": "x"}, 5],
)
def test_malformed_added_tokens(entry: Any, tmp_path: Path) -> None:
    train_bytes(tmp_path)
    edit(tmp_path / "tokenizer.json", added_tokens=[entry])
    with pytest.raises(UserError, match=r"malformed|expected 0 to 329"):
        convert_tokenizer(tmp_path, 330)


TIKTOKEN = "".join(f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256)).encode()


@pytest.mark.parametrize("content", [TIKTOKEN, b"", b"\0\1\2"])
def test_tokenizer_json_beside_a_tokenizer_model_that_is_none(content: bytes, tmp_path: Path) -> None:
    reference = train_bytes(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(content)
    with converted(tmp_path, 320) as tokenizer:
        assert tokenizer.encode("The lazy dog") == reference.encode("The lazy dog").ids
    assert convert_tokenizer(tmp_path, 320).notes == (
        "tokenizer.json is read, not tokenizer.model (not a SentencePiece model, or cut off)",
    )
    edit(tmp_path / "tokenizer.json", model=None)  # as some files with added tokens alone
    with pytest.raises(UserError, match=r"tokenizer.model`: not a SentencePiece model"):
        convert_tokenizer(tmp_path, 320)


@pytest.mark.parametrize("prefix", [False, True])
def test_add_prefix_space_counts_more_than_the_model(prefix: bool, tmp_path: Path) -> None:
    model = train_sentencepiece(tmp_path, add_dummy_prefix=not prefix)
    edit(tmp_path / "tokenizer_config.json", add_prefix_space=prefix)
    with converted(tmp_path, len(model)) as tokenizer:
        for text in ("a", "The dog", " a"):
            expected = model.encode(f" {text}") if prefix else model.encode(f"\n{text}")[2:]
            assert tokenizer.encode(text, add_special=False) == expected, repr(text)


@pytest.mark.parametrize(("legacy", "space"), [(True, True), (None, True), (False, False)])
def test_a_text_behind_a_special_token_begins_with_a_space_in_legacy_models_only(
    legacy: bool | None, space: bool, tmp_path: Path
) -> None:
    model = train_sentencepiece(tmp_path, user_defined_symbols=["<tool>"])
    edit(tmp_path / "tokenizer_config.json", legacy=legacy)
    with converted(tmp_path, len(model)) as tokenizer:
        behind = model.encode("dog") if space else model.encode("\ndog")[2:]
        assert tokenizer.encode("The</s>dog", add_special=False) == [*model.encode("The"), 2, *behind]
        for text in (*PROBES, "a<tool>dog <tool>", "<tool>"):  # which is a piece of the text, with no space behind it
            assert tokenizer.encode(text, add_special=False) == model.encode(text), repr(text)


def test_composed_characters(tmp_path: Path) -> None:
    from test_convert_tokenizer import PRE_TOKENIZER_JSON

    reference = train_bytes(tmp_path, PRE_TOKENIZER_JSON["qwen2"])
    reference.normalizer = normalizers.NFC()
    reference.save(str(tmp_path / "tokenizer.json"))
    with converted(tmp_path, 320) as tokenizer:
        for text in ("cafe\u0301", "\u1112\u1161\u11ab", "\u212b<|end|>\u0338", "s\u0323\u0307"):
            assert tokenizer.encode(text) == reference.encode(text).ids, repr(text)


@pytest.mark.parametrize(
    "normalizer",
    [
        {"type": "Sequence", "normalizers": []},
        {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": []}]},
        None,
    ],
)
def test_a_sequence_of_no_steps_is_none(normalizer: Any, tmp_path: Path) -> None:
    reference = train_bytes(tmp_path)
    wrapped = pre_tokenizers.Sequence([pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(add_prefix_space=False)])])
    edit(tmp_path / "tokenizer.json", normalizer=normalizer, pre_tokenizer=json.loads(wrapped.__getstate__()))
    with converted(tmp_path, 320) as tokenizer:
        assert tokenizer.encode("The dog") == reference.encode("The dog").ids


@pytest.mark.parametrize("told", [{}, {"add_bos_token": False}, {"add_bos_token": True, "add_eos_token": True}])
@pytest.mark.parametrize("template", ["<b> $A <e>", "$A <e>", "<b> $A", "$A", None])
def test_a_post_processor_alone_says_what_is_added(template: str | None, told: dict[str, bool], tmp_path: Path) -> None:
    reference = train_bytes(tmp_path)
    reference.add_special_tokens(["<b>", "<e>"])
    if template:
        specials = [("<b>", 320), ("<e>", 321)]
        reference.post_processor = processors.TemplateProcessing(template, special_tokens=specials)
    reference.save(str(tmp_path / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|end|>", "eos_token": "<e>"}
    edit(tmp_path / "tokenizer_config.json", **names, **told)
    original = AutoTokenizer.from_pretrained(tmp_path)
    with converted(tmp_path, 322) as tokenizer:
        assert tokenizer.encode("The dog") == original("The dog")["input_ids"] == reference.encode("The dog").ids


def test_a_post_processor_that_adds_more_than_can_be_said(tmp_path: Path) -> None:
    reference = train_bytes(tmp_path)
    reference.add_special_tokens(["<b>", "<e>"])
    reference.post_processor = processors.TemplateProcessing("<b> <e> $A", special_tokens=[("<b>", 320), ("<e>", 321)])
    reference.save(str(tmp_path / "tokenizer.json"))
    edit(tmp_path / "tokenizer_config.json", bos_token="<b>", add_bos_token=True)
    with pytest.raises(UserError, match=r"the text '' is \[320\] in libllama, expected \[320, 321\]"):
        convert_tokenizer(tmp_path, 322)


def test_a_class_that_puts_a_space_before_texts(tmp_path: Path) -> None:
    reference = train_bytes(tmp_path)
    edit(tmp_path / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", add_prefix_space=True)
    assert AutoTokenizer.from_pretrained(tmp_path)("dog")["input_ids"] == reference.encode("dog").ids
    convert_tokenizer(tmp_path, 320)
    edit(tmp_path / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    assert AutoTokenizer.from_pretrained(tmp_path)("dog")["input_ids"] != reference.encode("dog").ids
    with pytest.raises(UserError, match="`GPT2Tokenizer` with add_prefix_space, expected"):
        convert_tokenizer(tmp_path, 320)


def test_tokens_that_are_named_and_nowhere_listed(tmp_path: Path) -> None:
    """They get the next ids, the usual names first, whatever the order in the file."""
    train_bytes(tmp_path)
    names = {"additional_special_tokens": ["<x>", "<|end|>"], "pad_token": "[PAD]", "bos_token": "<b>"}
    edit(tmp_path / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", **names)
    reference = AutoTokenizer.from_pretrained(tmp_path)
    with converted(tmp_path, 330) as tokenizer:
        for text in ("a<x>b [PAD]<b>", "<x>", "The <|end|> dog[PAD]"):
            assert tokenizer.encode(text) == reference(text)["input_ids"], text
    found = convert_tokenizer(tmp_path, 322)
    assert found.notes == ("added tokens left out, for the model has 322 rows of embeddings: `<x>` (322)",)


def test_an_added_token_left_out_whose_text_is_spelled_otherwise(tmp_path: Path) -> None:
    """In GPT-2's alphabet of bytes É is a byte; the library takes the text É for the token of that byte."""
    train_bytes(tmp_path)
    values = json.loads((tmp_path / "tokenizer.json").read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    edit(tmp_path / "tokenizer.json", added_tokens=[*values["added_tokens"], {"id": 320, "content": "\u00c9", **flags}])
    with pytest.raises(UserError, match=r"the text '\\xc9' is .* in libllama, expected"):
        convert_tokenizer(tmp_path, 330)


@pytest.mark.parametrize(
    ("token", "text"),
    [
        (AddedToken("<e\u0301>", normalized=True), r"<\\xe9>"),
        (AddedToken("<\u00e9>", normalized=False), r"<e\\u0301>"),
    ],
)
def test_an_added_token_that_another_spelling_becomes(token: AddedToken, text: str, tmp_path: Path) -> None:
    from test_convert_tokenizer import PRE_TOKENIZER_JSON

    reference = train_bytes(tmp_path, PRE_TOKENIZER_JSON["qwen2"])
    reference.normalizer = normalizers.NFC()
    reference.add_tokens([token])
    reference.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=f"the text '{text}' is .* in libllama, expected"):
        convert_tokenizer(tmp_path, 330)


def test_an_added_token_that_begins_with_a_space(tmp_path: Path) -> None:
    """libllama would take the space that is put before a text for the token's own."""
    from test_merges import merges_of

    train_sentencepiece(tmp_path)
    vocab, merges = merges_of(tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer.model").unlink()
    saved = LlamaTokenizer(vocab=vocab, merges=merges)
    saved.backend_tokenizer.add_tokens([AddedToken(" tool", normalized=False)])
    saved.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"the text 'tool' is .* in libllama, expected"):
        convert_tokenizer(tmp_path, 400)


@pytest.mark.parametrize("place", ["tokenizer.json", "added_tokens.json"])
def test_two_texts_for_one_id(place: str, tmp_path: Path) -> None:
    values = json.loads(train_bytes(tmp_path).to_str())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    entries = [{"id": 320, "content": text, **flags} for text in ("<x>", "<y>")]
    edit(tmp_path / "tokenizer.json", added_tokens=[*values["added_tokens"], entries[0]])
    if place == "tokenizer.json":
        edit(tmp_path / place, added_tokens=[*values["added_tokens"], *entries])
    else:
        edit(tmp_path / place, **{"<y>": 320})
    with pytest.raises(UserError, match=r"malformed .*token 320 is '<[xy]>' and '<[xy]>'"):
        convert_tokenizer(tmp_path, 330)


def test_a_tokenizer_model_of_another_vocabulary(tmp_path: Path) -> None:
    """As transformers does, tokenizer.json is read."""
    train_sentencepiece(tmp_path)
    reference = train_bytes(tmp_path)
    found = convert_tokenizer(tmp_path, 340)
    assert "tokenizer.json is read, not tokenizer.model (its token 1 is '<s>', and '!' in" in found.notes[0]
    with converted(tmp_path, 340) as tokenizer:
        for text in PROBES:
            assert tokenizer.encode(text) == reference.encode(text).ids, repr(text)


def test_a_vocabulary_that_another_pre_tokenizer_made(tmp_path: Path) -> None:
    """Merges across what libllama's Falcon splits later than the library: only ids tell."""
    from test_convert_tokenizer import PRE_TOKENIZER_JSON

    train_bytes(tmp_path)
    values = json.loads((tmp_path / "tokenizer.json").read_text())
    assert ["Ġ", "1"] in values["model"]["merges"] or "Ġ1" in values["model"]["vocab"] or _merge_digit(values)
    edit(
        tmp_path / "tokenizer.json",
        model=values["model"],
        pre_tokenizer=json.loads(PRE_TOKENIZER_JSON["falcon"].__getstate__()),
    )
    with pytest.raises(UserError, match=r"the text '.*' is \[.*\] in libllama, expected \[.*\] as by"):
        convert_tokenizer(tmp_path, 330)


def _merge_digit(values: dict[str, Any]) -> bool:
    values["model"]["vocab"]["Ġ1"] = 320
    values["model"]["merges"].insert(0, ["Ġ", "1"])
    return True


def test_rules_rewrite_nothing_but_what_they_name() -> None:
    rules = TextRules(special=frozenset({"<s>", "<s>>"}), user_defined=frozenset({"<t>"}), prefix="added", once=True)
    assert rules.rewritten("a<s>>b<t> c<s><s>", parse_special=True) == " a<s>> b<t> c<s><s>"
    assert rules.rewritten("a<s>b<t>c", parse_special=False) == " a<s>b<t> c"
    assert TextRules(prefix="first").rewritten("", parse_special=True) == ""
