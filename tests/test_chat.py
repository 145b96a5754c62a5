"""`python -m runtime chat` in a process of its own, through a pipe."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from parrot import WOMEN

import runtime
from convert import convert
from runtime.text.sampling import Sampling

ROOT = Path(__file__).parent.parent
CHATML = """\
{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '</s>\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}
"""
GREEDY = Sampling(temperature=0)


def chat(*arguments: object, stdin: str | bytes) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "runtime", "chat", *map(str, arguments), "--threads", "1"]
    raw = stdin if isinstance(stdin, bytes) else stdin.encode()
    done = subprocess.run(command, cwd=ROOT, input=raw, capture_output=True, timeout=600, check=False)
    return subprocess.CompletedProcess(command, done.returncode, done.stdout.decode(), done.stderr.decode())


def test_a_pipe_gets_replies_and_nothing_else(tiny_gguf: Path) -> None:
    done = chat(tiny_gguf, "--temp", 0, "-n", 6, stdin="My fellow citizens,\n\nWe must")
    assert done.returncode == 0
    assert done.stderr.count("no chat template") == len(done.stderr.splitlines()) == 1
    with_json = chat(tiny_gguf, "--temp", 0, "-n", 6, "--json", stdin="My fellow citizens,\n\nWe must\n/stats\n")
    *replies, last = with_json.stdout.splitlines()
    result = json.loads(last)
    assert "\n".join(replies) + "\n" == done.stdout == "".join(r.removesuffix("\n") + "\n" for r in result["replies"])
    assert len(result["replies"]) == 2
    assert (result["tokens"], result["ffn"], result["stop_reasons"]) == (12, "exact", ["length", "length"])
    assert result["tokens_per_s"] > 0
    assert 0 < result["computed_share"] < 0.5
    assert "neurons computed" in with_json.stderr


def test_without_shifting_a_full_context_is_one_line_on_stderr(tiny_gguf: Path) -> None:
    lines = "My fellow citizens,\nAnd now\n/reset\nWe\n"
    done = chat(tiny_gguf, "--temp", 0, "-n", 100, "-c", 32, "--no-shift", stdin=lines)
    assert done.returncode == 1
    assert "the context of 32 tokens is full: /reset begins anew" in done.stderr
    assert "error: the conversation has 3" in done.stderr
    assert "Traceback" not in done.stderr
    assert "dropped" not in done.stderr


def test_old_messages_make_room_and_it_is_said(tiny_gguf: Path) -> None:
    done = chat(tiny_gguf, "--temp", 0, "-n", 20, "-c", 32, "--json", stdin="My fellow citizens,\nAnd now\nWe\n")
    assert done.returncode == 0
    dropped = re.findall(r"dropped the 2 oldest messages \((\d+) tokens\) to fit the context of 32 tokens", done.stderr)
    assert len(dropped) == 2
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["stop_reasons"] == ["length"] * 3
    assert result["dropped_messages"] == 4


def test_a_text_alone_too_long_is_an_error(tiny_gguf: Path) -> None:
    done = chat(tiny_gguf, "-c", 32, "--temp", 0, "-n", 4, stdin="We\n" + "word " * 40 + "\nWe\n")
    assert done.returncode == 1
    assert re.search(r"error: your text has \d+ tokens, expected fewer than the context of 32", done.stderr)
    assert "hint: shorten it" in done.stderr
    assert len(done.stdout.splitlines()) >= 2


def test_lines_of_any_kind(emoji_gguf: Path) -> None:
    lines = "\U0001f642".encode() * 2000 + b"\r\n\xff\xfe\n\r\n  \nno newline"
    done = chat(emoji_gguf, "-c", 8192, "--temp", 0, "-n", 14, "--json", stdin=lines)
    result = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 1
    assert done.stderr.count("error: ") == done.stderr.count("error: stdin: byte 0 is 0xff, expected UTF-8 text") == 1
    assert result["replies"] == [WOMEN * 2] * 2
    assert result["prompt_tokens"] > 8000
    assert done.stdout.splitlines()[:2] == result["replies"]


def test_exit_leaves_the_rest_unread(tiny_gguf: Path) -> None:
    done = chat(tiny_gguf, "--temp", 0, "-n", 2, "--json", stdin="We\n/exit\nMust\n")
    assert done.returncode == 0
    assert len(json.loads(done.stdout.splitlines()[-1])["replies"]) == 1


def test_a_prompt_of_the_command_line_comes_first(tiny_gguf: Path, tmp_path: Path) -> None:
    file = tmp_path / "first.txt"
    file.write_text("/My fellow\ncitizens,\n", encoding="utf-8")
    replies = []
    for first in (("-p", "/My fellow\ncitizens,"), ("--prompt-file", file)):
        done = chat(
            tiny_gguf, "--temp", 0, "-n", 6, *first, "--json", stdin=f"We must\n/save {tmp_path / 'talk.json'}\n"
        )
        assert done.returncode == 0
        replies.append(json.loads(done.stdout.splitlines()[-1])["replies"])
    assert replies[0] == replies[1]
    saved = json.loads((tmp_path / "talk.json").read_text())["messages"]
    assert [m["content"] for m in saved if m["role"] == "user"] == ["/My fellow\ncitizens,", "We must"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-p", " \n"), "the prompt is blank"),
        (("--prompt-file", "missing.txt"), "missing.txt"),
        (("-p", "x", "--prompt-file", "y"), "not allowed with"),
        (("-p", "\udcff"), "--prompt: byte 0 is 0xff, expected UTF-8"),
        (("--system", "a\udcff"), "--system: byte 1 is 0xff, expected UTF-8"),
        (("--no-shft",), "unrecognized arguments: --no-shft"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(arguments: tuple[str, ...], message: str, tiny_gguf: Path) -> None:
    done = chat(tiny_gguf, *arguments, stdin="We\n")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
    assert message in done.stderr.splitlines()[0]


def test_without_a_terminal_nothing_is_coloured(tiny_gguf: Path) -> None:
    done = chat(tiny_gguf, "--temp", 0, "-n", 4, stdin="We\n/stats\n/bogus\n")
    assert "\x1b" not in done.stdout + done.stderr
    assert "hint: /help lists them" in done.stderr


def test_run_is_chat(tiny_gguf: Path) -> None:
    command = [sys.executable, "-m", "runtime", "run", str(tiny_gguf), "--temp", "0", "-n", "6"]
    done = subprocess.run(command, cwd=ROOT, input="We must\n", capture_output=True, encoding="utf-8", check=True)
    assert done.stdout == chat(tiny_gguf, "--temp", 0, "-n", 6, stdin="We must\n").stdout


@pytest.fixture(scope="module")
def templated_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("templated")
    shutil.copytree(ROOT / "examples/tiny-relu-llama", folder / "checkpoint")
    (folder / "checkpoint" / "chat_template.jinja").write_text(
        "{% if messages[0].role == 'system' %}\
{{ raise_exception('no system prompts here') }}{% endif %}"
        + CHATML
    )
    convert(folder / "checkpoint", folder / "model.gguf", calibration="none")
    return folder / "model.gguf"


def test_the_files_template_is_used(templated_gguf: Path) -> None:
    done = chat(templated_gguf, "--temp", 0, "-n", 6, "--json", stdin="Hi\n")
    assert (done.returncode, done.stderr) == (0, "")
    with runtime.load(templated_gguf) as model:
        ids = model.tokenize("<|user|>\nHi</s>\n<|assistant|>\n", add_special=False)
        expected = "".join(model.generate(ids, max_tokens=6, sampling=GREEDY))
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["replies"], result["prompt_tokens"]) == ([expected], len(ids))


def test_a_template_that_refuses_is_one_line(templated_gguf: Path) -> None:
    done = chat(templated_gguf, "--system", "Be brief.", stdin="Hi\n")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: chat template: no system prompts here\nhint: ")
