"""SentencePiece BPE from `tokenizer.json` alone: the scores that its merges stand for, and how it treats spaces.

Libraries that save a SentencePiece tokenizer this way keep the merges and drop the scores. libllama wants scores: it
merges the neighbours whose union has the highest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from convert.config import Config
from convert.tokenizer import spm
from convert.tokenizer.bpe import flat
from convert.tokenizer.spm import SPACE
from runtime.errors import UserError

_ORIGINAL = "put the original tokenizer.model beside it"
Merge = tuple[str, str]


@dataclass(frozen=True)
class Spaces:
    """Where a space is put: before a text (`prefix`), after each added token too (`each`), nowhere before one that is
    there (`once`).
    """

    prefix: bool
    each: bool = False
    once: bool = False


@dataclass(frozen=True)
class MergedVocabulary:
    """Tokens (text -> id), the score of each that merges make, the text of the unknown token, and what is done to
    spaces.
    """

    vocab: Mapping[str, int]
    scores: dict[str, float]
    unknown: str
    spaces: Spaces


def is_sentencepiece(tokenizer: Config) -> bool:
    """Whether the file's model works on characters with bytes for those that it does not know."""
    return tokenizer.inside("model").get("byte_fallback", bool, False)


def read_merged(tokenizer: Config, added: set[str]) -> MergedVocabulary:
    """Read the tokenizer.json of a SentencePiece BPE; added: texts that are matched before anything is merged.

    Raises UserError where scores cannot stand for its merges, or its spaces are treated in a way that is not known.
    """
    model = tokenizer.inside("model")
    vocab = model.get("vocab", dict)
    if not _byte_tokens() <= vocab.keys():
        raise UserError(f"{tokenizer.where}: byte fallback without a token for each of the 256 bytes")
    for option in ("dropout", "ignore_merges", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.values.get(option):
            raise UserError(f"{tokenizer.where}: SentencePiece BPE with `{option}`, expected one without")
    ranks = _ranks(model.get("merges", list))
    scores, wrong = {}, []
    for text in vocab:
        if len(text) == 1 or text in added:
            continue
        parts, rank = _merged(text, ranks)
        if len(parts) == 1:
            scores[text] = -float(rank)
        elif len(parts) == 2:
            wrong.append(text)
    if wrong:
        raise UserError(
            f"{tokenizer.where}: no merge makes the token {wrong[0]!r} of two others (so with {len(wrong)} tokens), "
            "and scores, which libllama wants, cannot say so",
            _ORIGINAL,
        )
    # Words that begin with a space are merged alone; where no token reaches into the next one, that is no difference.
    split = any(SPACE in text[1:] for text in vocab if text not in added)
    return MergedVocabulary(vocab, scores, model.get("unk_token", str, ""), _spaces(tokenizer, may_split=not split))


def _byte_tokens() -> set[str]:
    return set(map(spm.byte_token, range(256)))


def _ranks(merges: list[Any]) -> dict[Merge, int]:
    """Pairs and their places in the list; of one that is there twice the last counts, as in the tokenizers library."""
    pairs = (tuple(entry.split(" ", 1)) if isinstance(entry, str) else tuple(entry) for entry in merges)
    return {(left, right): rank for rank, (left, right) in enumerate(pairs)}


def _merged(text: str, ranks: dict[Merge, int]) -> tuple[list[str], int]:
    """What becomes of the characters of `text` on their own, and the rank of the last merge.

    A token made of a longer text had nothing merged across its ends, so inside it the same merges were made in the same
    order:
    the last one here is the only one that ever makes it, and its rank the only one that counts. Where this ends with
    two parts, scores would merge them and the file does not; where it ends with more, neither does.
    """
    parts, rank = list(text), 0
    while len(parts) > 1:
        found = [(ranks[pair], at) for at, pair in enumerate(pairwise(parts)) if pair in ranks]
        if not found:
            break
        rank, at = min(found)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts, rank


def _spaces(tokenizer: Config, may_split: bool) -> Spaces:
    """How spaces are treated, from the normalizer and the pre-tokenizer in whichever form they are written.

    may_split: whether words may be cut before merging.
    """
    steps = list(flat(tokenizer.values.get("normalizer")))
    splits = list(flat(tokenizer.values.get("pre_tokenizer")))
    kinds = sorted(_kind(step, may_split) for step in steps), [_kind(step, may_split) for step in splits]
    if kinds == (["prepend", "replace"], []):
        return Spaces(prefix=True, each=True)
    if kinds == (["replace"], []):
        return Spaces(prefix=False)
    if kinds in (([], ["metaspace"]), (["replace"], ["metaspace"])):
        scheme = splits[0].get("prepend_scheme") or ("always" if splits[0].get("add_prefix_space", True) else "never")
        return Spaces(prefix=scheme != "never", each=scheme == "always", once=True)
    raise UserError(
        f"{tokenizer.where}: SentencePiece BPE with the normalizer "
        f"{str(tokenizer.values.get('normalizer'))[:150]} and the "
        f"pre-tokenizer {str(tokenizer.values.get('pre_tokenizer'))[:150]}, expected Prepend and Replace, or "
        "Metaspace without split",
        _ORIGINAL,
    )


def _kind(step: dict[str, Any], may_split: bool) -> str:
    known = {
        "prepend": {"type": "Prepend", "prepend": SPACE},
        "replace": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "metaspace": {"type": "Metaspace", "replacement": SPACE},
    }
    step = {key: value for key, value in step.items() if key not in ("prepend_scheme", "add_prefix_space", "str_rep")}
    if step["type"] == "Metaspace" and (step.get("split") is False or may_split):
        step.pop("split", None)
    return next((name for name, form in known.items() if form == step), step["type"])
