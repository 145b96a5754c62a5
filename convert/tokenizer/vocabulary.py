"""A checkpoint's tokenizer as GGUF key-value pairs (`tokenizer.ggml.*`, `tokenizer.chat_template`).

Two kinds: SentencePiece BPE (`tokenizer.model`, or its merges in `tokenizer.json`) and byte-level BPE
(`tokenizer.json`, or `vocab.json` with `merges.txt`). libllama does the tokenizing later: what is written here is
compared with the source's own library, and refused where it differs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from convert.config import Config, read_json, read_json_if_any
from convert.tokenizer import bpe, spm
from convert.tokenizer.added_tokens import AddedToken, SpecialTokens, read_added, read_special
from convert.tokenizer.chat_template import chat_template
from convert.tokenizer.end_tokens import end_tokens, first_id
from convert.tokenizer.merges import Spaces, is_sentencepiece, read_merged
from convert.tokenizer.oracles import Oracle, SentencePieceOracle, TokenizersOracle
from convert.tokenizer.self_check import check_ids
from runtime.errors import UserError
from runtime.text.text_rules import KEYS

# GGUF's names of the special tokens and their ids.
_SPECIAL_KEYS = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",
    "pad": "padding_token_id",
}
_CLASS_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}  # of LlamaTokenizer
_POST = "post_processor"  # of a tokenizer.json
_ADDED_SCORE = -1000.0  # of tokens that no merge may produce
_REFETCH = "fetch the tokenizer's files again from where the checkpoint came from"
_OTHER = "the tokenizer belongs to another checkpoint, or tokens were added to it without resizing the embeddings"


@dataclass(frozen=True)
class Converted:
    """A tokenizer's GGUF key-value pairs, and what its user should know."""

    metadata: dict[str, Any]
    notes: tuple[str, ...]


@dataclass
class Vocabulary:
    """Tokens by id with their GGUF types and scores, plus what is particular to the tokenizer's kind.

    source: names the file in errors. model: a tokenizer.model. values: a tokenizer.json. spaces: what is put
    before texts. bytes: whether tokens are written in GPT-2's alphabet of bytes. nfc: whether texts are composed.
    """

    source: str
    kind: dict[str, Any]
    tokens: list[str] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    model: spm.SentencePiece | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    spaces: Spaces = field(default_factory=lambda: Spaces(prefix=False))
    bytes: bool = False
    nfc: bool = False

    def extend(self, token_id: int) -> None:
        """Make room up to and including `token_id`, with unused tokens in the gaps, whose names `fill` may change."""
        for _ in range(len(self.tokens), token_id + 1):
            self.tokens.append("")
            self.types.append(spm.UNUSED)
            self.scores.append(_ADDED_SCORE)

    def set(self, token_id: int, text: str, kind: int, score: float) -> None:
        """Give a token its text, type and score."""
        self.extend(token_id)
        self.tokens[token_id], self.types[token_id], self.scores[token_id] = text, kind, score

    def fill(self) -> None:
        """Name the tokens that have no text, unlike any that has one."""
        taken = set(self.tokens)
        for i, text in enumerate(self.tokens):
            if not text:
                self.tokens[i], self.types[i] = filler(i, taken), spm.UNUSED


def filler(token_id: int, taken: set[str]) -> str:
    """A text for an unused token that no other has; it is added to those that are taken."""
    name = f"[PAD{token_id}]"
    while name in taken:
        name = f"[{name}]"
    taken.add(name)
    return name


def convert_tokenizer(folder: Path, vocab_size: int) -> Converted:
    """The tokenizer in `folder` as GGUF key-value pairs, for a model with `vocab_size` rows of embeddings.

    Missing ids become unused `[PAD<id>]` tokens; added tokens beyond the embeddings, and those whose text another token
    has, are left out with a note. Raises UserError when there is no tokenizer, one of another kind, one whose ids
    libllama would not give, or one with more tokens than the model.
    """
    config = read_json_if_any(folder / "tokenizer_config.json")
    try:
        return _converted(folder, config, vocab_size)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(
            f"`{folder}`: the tokenizer's files are malformed ({type(error).__name__}: {str(error)[:200]})", _REFETCH
        ) from None


def _converted(folder: Path, config: Config, vocab_size: int) -> Converted:
    special = read_special(folder, config)
    listed = read_added(folder, config, special)
    notes: list[str] = []
    named = {token.text for token in listed.values()} | {*special.named.values()}
    vocabulary = _read(folder, config, partial(_check_ids, folder, vocab_size), named, notes)
    wanted = _within(listed | _named(vocabulary, special, listed), vocab_size, folder, notes)
    added = _add_tokens(vocabulary, wanted, notes)
    vocabulary.extend(vocab_size - 1)
    vocabulary.fill()
    _check_texts(vocabulary, folder)
    oracle = _oracle(vocabulary, added, vocab_size)
    template, more = chat_template(folder, config, special, _class_tokens(config, vocabulary))
    metadata = _keys(vocabulary, added) | _special_keys(folder, config, special, vocabulary) | template
    pieces = [_plain(vocabulary, i) for i, kind in enumerate(vocabulary.types) if kind == spm.NORMAL]
    whole = oracle.whole if isinstance(oracle, TokenizersOracle) and _POST in vocabulary.values else None
    cut = {*(token.text for token in wanted.values()), *_cut(vocabulary)}
    check_ids(metadata, oracle, sorted(cut), [piece for piece in pieces if piece], vocabulary.source, whole)
    return Converted(metadata, (*notes, *more))


def _cut(vocabulary: Vocabulary) -> Iterator[str]:
    """Texts that libllama matches as a whole."""
    matched = (spm.UNKNOWN, spm.CONTROL, spm.USER_DEFINED)
    return (text for text, kind in zip(vocabulary.tokens, vocabulary.types, strict=True) if kind in matched)


def _within(added: dict[int, AddedToken], vocab_size: int, folder: Path, notes: list[str]) -> dict[int, AddedToken]:
    if min(added, default=0) < 0:
        raise UserError(f"`{folder}`: an added token has id {min(added)}, expected 0 to {vocab_size - 1}", _REFETCH)
    beyond = [f"`{token.text}` ({i})" for i, token in sorted(added.items()) if i >= vocab_size]
    if beyond:
        more = f" and {len(beyond) - 3} more" if len(beyond) > 3 else ""
        notes.append(
            f"added tokens left out, for the model has {vocab_size} rows of embeddings: {', '.join(beyond[:3])}{more}"
        )
    return {i: token for i, token in sorted(added.items()) if i < vocab_size}


Check = Callable[[Iterable[int]], None]  # of a vocabulary's ids, before there is room for each


def _read(folder: Path, config: Config, check: Check, added: set[str], notes: list[str]) -> Vocabulary:
    """The vocabulary from the file that says most: tokenizer.model, tokenizer.json, or GPT-2's pair of files."""
    model, tokenizer = folder / "tokenizer.model", folder / "tokenizer.json"
    if model.exists():
        try:
            return _sentencepiece(spm.SentencePiece(model), model, config, check, _whole(tokenizer))
        except UserError as error:
            # tiktoken's files have this name too, and conversions of other models leave theirs.
            if not _whole(tokenizer).values:
                raise
            notes.append(f"tokenizer.json is read, not tokenizer.model ({error.message.rpartition('`: ')[2]})")
    if tokenizer.exists():
        values = read_json(tokenizer)
        if is_sentencepiece(values):
            return _merged(values, added, check)
        bpe.check_prefix(config)
        return _byte_level(values, check)
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        return _byte_level(bpe.vocab_and_merges(folder, config), check)
    raise UserError(
        f"`{folder}`: no tokenizer in it", "expected tokenizer.model, tokenizer.json, or vocab.json with merges.txt"
    )


def _whole(tokenizer: Path) -> Config:
    """A tokenizer.json with a model in it; an empty object where there is none, or one of added tokens alone."""
    values = read_json_if_any(tokenizer)
    return values if values.get("model", dict, {}) else Config(values.where, {})


def _check_same(model: spm.SentencePiece, path: Path, other: Config) -> None:
    """Raise UserError where a tokenizer.json has other tokens than the tokenizer.model beside it."""
    vocab = other.inside("model").values.get("vocab")
    added = {entry["id"] for entry in other.get("added_tokens", list, [])}
    for text, i in vocab.items() if isinstance(vocab, dict) else ():
        here = model.pieces[i].text if 0 <= i < len(model.pieces) else None
        if here != text and i not in added:
            raise UserError(
                f"`{path}`: its token {i} is {here!r}, and {text!r} in tokenizer.json",
                "take away the one of another model",
            )


def _sentencepiece(model: spm.SentencePiece, path: Path, config: Config, check: Check, other: Config) -> Vocabulary:
    """other: the tokenizer.json beside it, if any."""
    _check_same(model, path, other)
    check(range(len(model.pieces)))
    prefix = config.get("add_prefix_space", bool, model.add_dummy_prefix)
    # Files without the key are older than it, and of its former default.
    spaces = Spaces(prefix, each=prefix and config.get("legacy", bool, True))
    kind = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default"}
    vocabulary = Vocabulary(f"`{path}`", kind, model=model, values=other.values, spaces=spaces)
    for i, piece in enumerate(model.pieces):
        text = piece.text.replace(spm.SPACE, " ") if piece.kind == spm.USER_DEFINED else piece.text
        vocabulary.set(i, text, piece.kind, piece.score)
    return vocabulary


def _merged(tokenizer: Config, added: set[str], check: Check) -> Vocabulary:
    found = read_merged(tokenizer, added)
    check(found.vocab.values())
    kind = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default"}
    vocabulary = Vocabulary(tokenizer.where, kind, values=tokenizer.values, spaces=found.spaces)
    byte_tokens = {spm.byte_token(byte) for byte in range(256)}
    for text, i in sorted(found.vocab.items(), key=lambda item: item[1]):
        special = spm.UNKNOWN if text == found.unknown else spm.BYTE if text in byte_tokens else spm.NORMAL
        vocabulary.set(i, text, special, found.scores.get(text, 0.0 if len(text) == 1 else _ADDED_SCORE))
    return vocabulary


def _byte_level(tokenizer: Config, check: Check) -> Vocabulary:
    found = bpe.read_byte_level(tokenizer)
    check(found.vocab.values())
    kind = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": found.pre, "tokenizer.ggml.merges": found.merges}
    vocabulary = Vocabulary(tokenizer.where, kind, values=tokenizer.values, bytes=True, nfc=found.nfc)
    for text, i in sorted(found.vocab.items(), key=lambda item: item[1]):
        vocabulary.set(i, text, spm.NORMAL, 0.0)
    return vocabulary


def _check_ids(folder: Path, vocab_size: int, ids: Iterable[int]) -> None:
    """Raise UserError where a file's tokens are more than there are rows of embeddings."""
    highest = max(ids, default=0)
    if highest >= vocab_size:
        raise UserError(
            f"`{folder}`: the tokenizer has token id {highest}, expected ids below `vocab_size` {vocab_size}", _OTHER
        )


def _named(vocabulary: Vocabulary, special: SpecialTokens, listed: Mapping[int, AddedToken]) -> dict[int, AddedToken]:
    """Special tokens that are named and not listed: they too are matched as a whole.

    Those without an id get the next ones, as in transformers.
    """
    known = {token.text for token in listed.values()}
    ids = {text: i for i, text in reversed(list(enumerate(vocabulary.tokens))) if text}
    following = itertools.count(max(len(vocabulary.tokens), max(listed, default=-1) + 1))
    found: dict[int, AddedToken] = {}
    for text in dict.fromkeys((*special.named.values(), *special.others)):
        if text not in known and (i := ids[text] if text in ids else next(following)) not in listed:
            found[i] = special.flags.get(text, AddedToken(text, special=True))
    return found


def _class_tokens(config: Config, vocabulary: Vocabulary) -> dict[str, str]:
    """Special tokens that the tokenizer's class names where its files do not (a null names none)."""
    usual = "LlamaTokenizer" if vocabulary.model else ""
    is_llama = config.get("tokenizer_class", str, usual).removesuffix("Fast") == "LlamaTokenizer"
    return {name: text for name, text in _CLASS_TOKENS.items() if is_llama and name not in config.values}


def _add_tokens(vocabulary: Vocabulary, added: Mapping[int, AddedToken], notes: list[str]) -> dict[int, AddedToken]:
    """Give added tokens their places; returns those that got them: of two with one text the first keeps it."""
    first = {text: i for i, text in reversed(list(enumerate(vocabulary.tokens))) if text}
    kept: dict[int, AddedToken] = {}
    for i, token in sorted(added.items()):
        if first.setdefault(token.text, i) != i:
            notes.append(f"added token {i} left out: its text {token.text!r} is that of token {first[token.text]}")
            continue
        kept[i] = token
        vocabulary.extend(i)
        if vocabulary.tokens[i] == token.text and vocabulary.types[i] not in (spm.NORMAL, spm.UNUSED):
            continue  # the model file's own type is more exact, e.g. *unknown* for <unk>
        vocabulary.set(i, token.text, spm.CONTROL if token.special else spm.USER_DEFINED, _ADDED_SCORE)
    return kept


def _check_texts(vocabulary: Vocabulary, folder: Path) -> None:
    for i, text in enumerate(vocabulary.tokens):
        if "\0" in text:
            raise UserError(f"`{folder}`: token {i} is {text!r}, expected a text without NUL", "GGUF cannot hold it")


def _oracle(vocabulary: Vocabulary, added: Mapping[int, AddedToken], vocab_size: int) -> Oracle:
    if vocabulary.model:
        return SentencePieceOracle(vocabulary.model, vocabulary.spaces, added)
    return TokenizersOracle(vocabulary.values, added, vocab_size, vocabulary.source)


def _plain(vocabulary: Vocabulary, token_id: int) -> str:
    """What a token stands for in a text, "" for a part of a character."""
    text = vocabulary.tokens[token_id]
    return bpe.decoded(text) if vocabulary.bytes else text.replace(spm.SPACE, " ")


def _keys(vocabulary: Vocabulary, added: Mapping[int, AddedToken]) -> dict[str, Any]:
    """Tokens, and how texts are treated before they are split."""
    keys = {
        **vocabulary.kind,
        "tokenizer.ggml.tokens": vocabulary.tokens,
        "tokenizer.ggml.token_type": vocabulary.types,
        **_space_keys(vocabulary, added),
    }
    if not vocabulary.bytes:
        keys["tokenizer.ggml.scores"] = vocabulary.scores
    for side in ("lstrip", "rstrip"):
        if ids := [i for i, token in added.items() if getattr(token, side)]:
            keys[f"{KEYS}.{side}_token_ids"] = ids
    return keys | ({f"{KEYS}.normalizer": "nfc"} if vocabulary.nfc else {})


def _space_keys(vocabulary: Vocabulary, added: Mapping[int, AddedToken]) -> dict[str, Any]:
    """GGUF's key where libllama does what is wanted, ours where it does not."""
    spaces, model = vocabulary.spaces, vocabulary.model
    pieces = model.pieces if model else ()
    own = [i for i, piece in enumerate(pieces) if piece.kind == spm.USER_DEFINED and i not in added]
    by_libllama = not spaces.prefix or (spaces.each and not spaces.once and not own)
    keys: dict[str, Any] = {"tokenizer.ggml.add_space_prefix": spaces.prefix and by_libllama}
    if by_libllama:
        return keys
    keys[f"{KEYS}.space_prefix"] = "added" if spaces.each else "first"
    return (
        keys
        | ({f"{KEYS}.space_prefix_once": True} if spaces.once else {})
        | ({f"{KEYS}.piece_token_ids": own} if own else {})
    )


def _special_keys(folder: Path, config: Config, special: SpecialTokens, vocabulary: Vocabulary) -> dict[str, Any]:
    """Ids of the special tokens, named by the tokenizer's own files, else by the model's; which are added; which end a
    text.
    """
    by_text = {text: i for i, text in enumerate(vocabulary.tokens)}
    found: dict[str, int] = {}
    for short in _SPECIAL_KEYS:
        named = by_text.get(special.named.get(f"{short}_token", ""))
        given = first_id(folder, f"{short}_token_id") if named is None else named
        if given is not None and 0 <= given < len(by_text):
            found[short] = given
    ends = end_tokens(folder, special, by_text, found.get("eos"))
    adds = _added_ends(config, vocabulary, by_text, found)
    return {f"tokenizer.ggml.{_SPECIAL_KEYS[short]}": i for short, i in found.items()} | adds | ends


def _added_ends(
    config: Config, vocabulary: Vocabulary, by_text: Mapping[str, int], found: dict[str, int]
) -> dict[str, bool]:
    """Whether texts begin with BOS and end with EOS; changes `found` where the post-processor says that another token
    is that.

    As in transformers, a tokenizer.json says so alone. Beside a tokenizer.model it counts where tokenizer_config.json
    does not say.
    """
    usual = (bool(vocabulary.model), False)  # of transformers' Llama tokenizer, whose configs often leave it out
    has_post, post = _POST in vocabulary.values, vocabulary.values.get(_POST)
    keys: dict[str, bool] = {}
    for short, text, default in zip(("bos", "eos"), bpe.added_by(post) if post else (None, None), usual, strict=True):
        name = f"add_{short}_token"
        alone = has_post and (vocabulary.model is None or config.values.get(name) is None)
        if alone and text is not None and text in by_text:
            found[short] = by_text[text]
        adds = text in by_text if alone else config.get(name, bool, default)
        keys[f"tokenizer.ggml.{name}"] = adds and short in found
    return keys
