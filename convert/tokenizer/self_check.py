"""Holds a written vocabulary, read through libllama, against the checkpoint's own library, on texts that are made to
hurt.

What differs would be wrong for good, and silently: so every conversion does this. Takes about a second.
"""

from __future__ import annotations

import random
import tempfile
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from convert.tokenizer.oracles import Oracle
from convert.tokenizer.spm import SPACE
from runtime.errors import UserError
from runtime.model_file.writer import NewFile, write_parts
from runtime.text.tokenizer import Tokenizer

Whole = Callable[[str], list[int]]
_SAMPLE = 192  # added tokens that are tried where there are more
_SEED = 20261127
# ruff: noqa: RUF001 - the texts are meant to hold unusual characters
PLAIN = (
    "",
    " ",
    "a",
    " leading and trailing ",
    "   three   inner    runs     ",
    "\n\n\nlines\r\nand\ttabs\t\t \n  \n",
    "\t\v\f\r\x1c\x1f nbsp\u00a0thin\u2009ideographic\u3000line\u2028paragraph\u2029narrow\u202f",
    "1 12 123 1234 12345678 3.14159 1,000,000 0x1F 1e-9 ½²① ٣٤٥ 四五",
    "it's we're they'll I'd YOU'VE o'clock 'tis rock'n'roll 's't're DON'T l’été",
    "for (i=0;i<n;++i){a[i]|=~b[i]&0xFF;} // ok\n\tif x != y:\n\t\tpass",
    "!!! ... ?!?! --- === *** ### $$$ %%% &&& @@@ <<<>>> ((([[[{{{}}}]]]))) \"\"\" ''' ``` \\\\\\ ^~|_",
    "…—–“quoted”‘single’ €£¥ «guillemets» 。、！？：；（）",
    "naïve café Ünïcödé Łódź İstanbul ǅ ﬁ ß ẞ",
    "русский українська ελληνικά עברית العربية فارسی हिन्दी বাংলা தமிழ் ไทย ລາວ ქართული հայերեն አማርኛ",
    "日本語の文章 中文的句子 한국어 문장 漢字かなカナ ｆｕｌｌｗｉｄｔｈ",
    "🙂👍🏽👩‍👩‍👧🏳️‍🌈🇫🇷 𝔘𝔫𝔦 𝟙𝟚𝟛 😀😀😀",
    "e\u0301 a\u0308 n\u0303 o\u0302\u0323 \u1e69 s\u0323\u0307 \u0344 \u212b \uac00 \u1100\u1161",
    "zero\u200bwidth joiner\u200d mark\u200e\u200f \ufeffBOM soft\u00adhyphen",
    "NUL\x00 inside \x01\x02\x7f\x1b[0m control",
    "▁ ▁▁ a▁b ▁▁▁▁ _",
    "<s></s><unk> <0x41><0x0A> <|im_start|> [INST] [PAD] <pad>",
    "\ue000\uf8ff\U000f0000\U0010ffff \ufffd",
    "supercalifragilisticexpialidocious" * 4,
    "aA1 bB2-cC3_dD4.eE5/fF6",
)
RUNS = tuple(
    c * n
    for c, n in (
        (" ", 130),
        ("a", 300),
        ("\n", 70),
        ("=", 200),
        ("-=", 80),
        ("1", 90),
        ("字", 120),
        ("ab ", 60),
        (" \n", 50),
        ("\t", 40),
        ("é", 50),
    )
)
_POOL = " \n\t'.,-_()[]<>|&0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_LETTERS = "äöüßéèñçøåæłœабвгдежзийклмнопрстαβγδεζηθאבגדהوةىيابتثकखगघกขคง日本語中文字한국어ひらがなカタカナ"


def check_ids(
    metadata: Mapping[str, Any],
    oracle: Oracle,
    added: Sequence[str],
    pieces: Sequence[str],
    where: str,
    whole: Whole | None = None,
) -> None:
    """Raise UserError with the first text of which the vocabulary in `metadata` makes other ids than the oracle.

    whole: gives the ids with what is added before and after a text, where the source says so in another place than
    `metadata`.
    added: texts of tokens that are matched as a whole; pieces: what other tokens stand for. where: names the source in
    errors.
    """
    with opened(metadata, where) as tokenizer:
        for text in _texts(added, pieces):
            _compare(text, tokenizer.encode(text, add_special=False), oracle.encode(text), where)
        begin = [tokenizer.bos] * metadata["tokenizer.ggml.add_bos_token"]
        end = [tokenizer.eos] * metadata["tokenizer.ggml.add_eos_token"]
        for text in PLAIN[:6]:
            right = whole(text) if whole else [*begin, *oracle.encode(text), *end]
            _compare(text, tokenizer.encode(text), right, where)


@contextmanager
def opened(metadata: Mapping[str, Any], where: str) -> Iterator[Tokenizer]:
    """The vocabulary in a file's keys, as libllama reads it.

    Raises UserError, which names `where`, when it does not.
    """
    with tempfile.TemporaryDirectory(prefix="lazyneuron-") as folder:
        file = Path(folder) / "vocabulary.gguf"
        keys = {key: value for key, value in metadata.items() if key != "tokenizer.chat_template"}
        try:
            write_parts([NewFile(file, keys, [])])
        except OSError as error:  # what people know is $TMPDIR
            raise OSError(error.errno, error.strerror, tempfile.gettempdir()) from None
        try:
            tokenizer = Tokenizer(file)
        except UserError as error:
            raise UserError(error.message.replace(f"`{file}`", where), error.hint) from None
        with tokenizer:
            yield tokenizer


def _texts(added: Sequence[str], pieces: Sequence[str]) -> Iterator[str]:
    draw = random.Random(_SEED)
    yield from PLAIN
    yield from RUNS
    sample = (
        list(added) if len(added) <= _SAMPLE else [*added[:32], *draw.sample(added[32:-32], _SAMPLE - 64), *added[-32:]]
    )
    for token in [spelled for one in sample for spelled in _spellings(one)]:
        other = draw.choice(sample)
        yield from (
            token,
            token * 2,
            f"a{token}b",
            f"é{token}9",
            f" {token} ",
            f"a {token} b",
            f"\n{token}\n",
            f"{token}\n\n a",
        )
        yield from (
            f"{token}a{other}",
            f"{token}{other} a",
            f"1{token}  \t{other}\r\n",
            f"x  {token}'s",
            f"{token}▁a",
            f"\u3000{token}\u00a0",
        )
    for _ in range(200):
        yield "".join(draw.choices(_POOL, k=24))
        yield "".join(draw.choices(_POOL + _LETTERS * 2, k=24))
    for _ in range(60):
        yield "".join(
            chr(
                draw.choice(
                    (
                        draw.randrange(0x20, 0x250),
                        draw.randrange(0x4E00, 0x9FA0),
                        draw.randrange(0xAC00, 0xD7A0),
                        draw.randrange(0x1F300, 0x1F600),
                    )
                )
            )
            for _ in range(16)
        )
    for _ in range(400 if pieces else 0):
        yield "".join(draw.choices(pieces, k=8))


def _spellings(token: str) -> list[str]:
    """A token, and texts that become it where spaces are put before a text, or characters composed."""
    changed = (token.strip(), token.replace(" ", SPACE), token.replace(SPACE, " "))
    composed = (unicodedata.normalize(form, token) for form in ("NFC", "NFD"))
    return [spelled for spelled in dict.fromkeys((token, *changed, *composed)) if spelled]


def _compare(text: str, found: Sequence[int], right: Sequence[int | None], where: str) -> None:
    if found == right:
        return
    same = next(
        (i for i, pair in enumerate(zip(found, right, strict=False)) if pair[0] != pair[1]), min(len(found), len(right))
    )
    raise UserError(
        f"{where}: the text {_short(text)} is {_window(found, same)} in libllama, expected "
        f"{_window(right, same)} as by the checkpoint's own library",
        "its tokenizer cannot be expressed in a GGUF file: see docs/families.md",
    )


def _short(text: str) -> str:
    shown = ascii(text)
    return shown if len(shown) <= 80 else f"{shown[:60]}...{shown[-15:]}"


def _window(ids: Sequence[int | None], at: int) -> str:
    shown = ", ".join(map(str, ids[max(at - 2, 0) : at + 4]))
    return f"[{'..., ' * (at > 2)}{shown}{', ...' * (len(ids) > at + 4)}]"
