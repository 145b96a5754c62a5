"""The documents: links lead somewhere, pages show the help, the options, the keys and the errors of today, and what can be typed is run."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import documents
import pytest
from checkpoints import first_block
from documents import ROOT, blocks
from hub_client import Client
from hub_server import TOKEN, Hub

from runtime.cli.help import HelpParser

BUNDLED = ROOT / "examples/tiny-relu-llama"
DOCUMENTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in documents.documents()}
PAGES = {command: path.relative_to(ROOT).as_posix() for command, path in documents.commands().items()}
HELP = {command: documents.help_of(command) for command in PAGES}


# --- help -------------------------------------------------------------------------------------------------------------


def test_every_command_has_a_page_with_its_help() -> None:
    for command, page in PAGES.items():
        assert page in DOCUMENTS, f"`{command}` has no page: write {page}, then run `make docs`"
        assert command in documents.embedded(DOCUMENTS[page]), f"{page} does not embed the help of `{command}`"
    pages = {name for name in DOCUMENTS if name.startswith("docs/commands/")} - {"docs/commands/README.md"}
    assert pages == set(PAGES.values()), "pages of commands that are not there"
    for name in [*pages, "docs/serve.md"]:
        assert documents.with_help(DOCUMENTS[name]) == DOCUMENTS[name], f"{name}: the help has changed, run `make docs`"


def test_help_is_the_same_whatever_the_environment() -> None:
    loud = {"COLUMNS": "40", "FORCE_COLOR": "1", "PYTHON_COLORS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "runtime", "plan", "--help"]
    shown = subprocess.run(command, env=os.environ | loud, cwd=ROOT, capture_output=True, text=True, check=True)
    assert shown.stdout == HELP["python -m runtime plan"]


def test_form_of_the_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    parser = HelpParser(prog="demo", description="Shows the form.")
    parser.add_argument("model", metavar="MODEL", help="a file")
    parser.add_argument("rest", metavar="REST", nargs="?")
    parser.add_argument("--threads", "-t", type=int, metavar="N", help="how many")
    parser.add_argument("--kind", choices=("a", "b"), required=True, help="one of two")
    parser.add_argument("--quite-a-long-option", metavar="WITH_A_VALUE", help="its text begins on the next line")
    parser.add_argument("--many", nargs="+", metavar="X", help=" ".join(["word"] * 20))
    parser.print_help()
    assert (
        capsys.readouterr().out
        == """\
usage: demo --kind {a,b} [options] MODEL [REST]

Shows the form.

positional arguments:
  MODEL                       a file
  REST

options:
  -h, --help                  show this help message and exit
  -t, --threads N             how many
  --kind {a,b}                one of two
  --quite-a-long-option WITH_A_VALUE
                              its text begins on the next line
  --many X [X ...]            word word word word word word word word word word word word word word
                              word word word word word word
"""
    )
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    narrow = parser.format_help().splitlines()
    assert "  --many X [X ...]            word word word word word word" in narrow
    assert max(map(len, narrow)) <= 60


def test_help_of_commands_within_commands() -> None:
    parser = HelpParser(prog="demo")
    verb = parser.add_subparsers(metavar="COMMAND").add_parser("go", help="leave")
    assert parser.format_help().startswith("usage: demo [options] COMMAND ...\n")
    assert "\n  COMMAND\n    go                        leave\n" in parser.format_help()
    assert verb.format_help() == (
        "usage: demo go [options]\n\noptions:\n  -h, --help                  show this help message and exit\n"
    )


# --- links ------------------------------------------------------------------------------------------------------------


def internal_links(name: str) -> Iterator[tuple[str, Path, str]]:
    """Of a document: each link into this repository, its target, its anchor."""
    for link in documents.links(DOCUMENTS[name]):
        if not re.match(r"[a-z]+:", link):
            target, _, anchor = link.partition("#")
            path = ROOT / name if not target else (ROOT / name).parent / target
            yield link, Path(os.path.normpath(path)), anchor


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    for link, target, anchor in internal_links(name):
        assert target.exists(), f"{name}: {link} leads nowhere"
        assert not anchor or anchor in documents.anchors(target.read_text(encoding="utf-8")), (
            f"{name}: no heading {link}"
        )


def test_every_page_can_be_reached_from_the_readme() -> None:
    seen, waiting = set(), ["README.md", "docs/commands/README.md"]
    while waiting:
        name = waiting.pop()
        if name in DOCUMENTS and name not in seen:
            seen.add(name)
            waiting += [
                path.relative_to(ROOT).as_posix() for _, path, _ in internal_links(name) if ROOT in path.parents
            ]
    assert {name for name in DOCUMENTS if name.startswith("docs/")} <= seen


# --- options ----------------------------------------------------------------------------------------------------------

FOREIGN = {  # options of other programs that the documents name
    "pip": {"--no-cache-dir", "--force-reinstall", "--no-deps"},
    "hf": {"--include", "--local-dir"},
    "mypy": {"--strict"},
    "llama.cpp": {"--n-cpu-ffn", "--n-gpu-layers"},
    "tests/serve_soak.py": {"--seconds", "--clients", "--growth", "--health"},
}


def test_options_exist() -> None:
    ours = {command: documents.options_in(text) for command, text in HELP.items()}
    any_of_them = set().union(*ours.values(), *FOREIGN.values())
    named = re.compile(rf"({'|'.join(sorted(map(re.escape, ours), key=len, reverse=True))})\b")
    for name, text in ((name, documents.without_help(text)) for name, text in DOCUMENTS.items()):
        spans = [span for line in documents.prose(text).splitlines() for span in re.findall(r"`([^`]+)`", line)]
        for span in [*spans, *documents.typed(text)]:
            found = named.search(span)
            known = any_of_them if found is None else ours[found[0]]
            for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", span):
                assert option in known, f"{name}: `{span}`: no option {option}"


def test_index_names_every_command() -> None:
    for command, page in PAGES.items():
        if page != "docs/commands/bench.md":
            assert f"| [`{command}`]({Path(page).name}) |" in DOCUMENTS["docs/commands/README.md"]


# --- keys of --json ----------------------------------------------------------------------------------------------------


def test_pages_name_every_key(run: Client, tmp_path: Path) -> None:
    """Those of results; metadata of files are described elsewhere."""
    checkpoint, model, text = tmp_path / "checkpoint", tmp_path / "model.gguf", tmp_path / "text.txt"
    checkpoint.mkdir()
    for name, data in first_block().items():
        (checkpoint / name).write_bytes(data)
    text.write_bytes((ROOT / "examples/heldout.txt").read_bytes()[:8000])
    commands: dict[str, tuple[str | Path, ...]] = {
        "convert": (checkpoint, model, "--calibration-tokens", "2048"),
        "runtime chat": (model, "-n", "2"),
        "runtime complete": (model, "-p", "My fellow citizens,", "-n", "2"),
        "runtime inspect": (model, "--tensors"),
        "runtime perplexity": (model, text, "--tokens", "64"),
        "runtime sparsity": (model,),
        "runtime devices": ("--measure",),
        "runtime plan": (model, "--vram-budget", "1", "--device-bandwidth", "1008", "--cpu-bandwidth", "60"),
        "runtime report": (
            *(model, tmp_path / "page.html", "--device-bandwidth", "1008", "--cpu-bandwidth", "60"),
            *("--ram-budget", "1", "--disk-bandwidth", "1", "--disk-reads", "50"),
        ),
        "predictors evaluate": (model, text, "--tokens", "512"),
        "predictors fit": (model, tmp_path / "other.gguf", "--calibration-tokens", "2048"),
        "convert card": (model, "--perplexity", text, "--perplexity-tokens", "64"),
        "convert push": (model, "user/model", "--no-plot"),
    }
    lines = [(*name.split(), *arguments, "--json") for name, arguments in commands.items()]
    variables = {"LAZYNEURON_CACHE": str(tmp_path / "cache"), "HF_TOKEN": TOKEN}
    for name, done in zip(commands, run.many(*lines, stdin="My fellow citizens,\n", **variables), strict=True):
        page = DOCUMENTS[f"docs/commands/{name.replace(' ', '-')}.md"]
        section = page[page.index("## With `--json`") : page.index("## Exit status")]
        keys, listed = keys_of(json.loads(done.out.splitlines()[-1])), set(re.findall(r"`(\w+)`", section))
        rows = " ".join(re.findall(r"^\| (`.*?) \|", section, re.MULTILINE))
        assert keys <= listed, f"{name}: {keys - listed} unexplained"
        assert set(re.findall(r"`(\w+)`", rows)) <= keys, f"{name}: keys that are not there"


def keys_of(value: Any) -> set[str]:
    """Keys of an object and of what it holds, but for those that come from a file."""
    if isinstance(value, list):
        return set().union(*map(keys_of, value))
    if not isinstance(value, dict):
        return set()
    described = ("general", "structure", "types", "parts", "fallbacks")
    return set(value).union(*(keys_of(part) for key, part in value.items() if key not in described))


# --- errors -----------------------------------------------------------------------------------------------------------

TROUBLE = DOCUMENTS["docs/troubleshooting.md"]
ERRORS = [line for block in blocks(TROUBLE) if block.language == "text" for line in block.text.splitlines()]
PROVOKED = (
    "convert Llama-3.2-1B out.gguf",
    "convert gpt2 out.gguf",
    "convert no-tokenizer out.gguf",
    "convert no-weights out.gguf",
    "convert cut out.gguf",
    "convert relulama-7b out.gguf",
    "convert user/nothing out.gguf",
    "convert meta-llama/Llama-2-7b-hf out.gguf",
    "convert Llama-3.2-1B tiny.gguf",
    "convert Llama-3.2-1B missing/out.gguf",
    "convert tiny.gguf out.gguf",
    "convert push tiny.gguf user/x --no-plot",
    "runtime complete u.gguf -p x --ffn dense",
    "runtime complete u.gguf -p x --ffn predicted",
    "runtime sparsity u.gguf",
    "runtime chat none.gguf",
    "runtime chat TheBloke/some-GGUF",
    "runtime chat cut.gguf",
    "runtime chat old.powerinfer.gguf",
    "runtime chat model.bin",
    "runtime chat cut",
    "runtime chat tiny.gguf --n-ctx 4096",
    "runtime complete tiny.gguf --prompt-file long.txt",
    "runtime chat tiny.gguf --device NONE0",
    "runtime chat tiny.gguf --device none --vram-budget 6",
    "runtime chat tiny.gguf --device CPU --vram-budget 6g6",
    "runtime chat tiny.gguf --threads 0",
    "runtime perplexity tiny.gguf latin1.txt",
    "predictors fit tiny.gguf out.gguf --calibration latin1.txt",
    "runtime chat tiny.gguf --nucleus 1",
)


@pytest.fixture
def mishaps(hub: Hub, tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with everything that PROVOKED needs."""
    monkeypatch.chdir(tmp_path)
    hub.refused["meta-llama/Llama-2-7b-hf"] = (403, "GatedRepo")
    hub.architecture = "llama"
    hub.add("TheBloke/some-GGUF", {"model.Q4_K_M.gguf": b"GGUF"})
    config = json.loads((BUNDLED / "config.json").read_text())
    for name, change in {
        "Llama-3.2-1B": {"hidden_act": "silu"},
        "gpt2": {"architectures": ["GPT2LMHeadModel"]},
        "no-tokenizer": {},
        "no-weights": {},
        "cut": {},
    }.items():
        shutil.copytree(BUNDLED, name)
        Path(name, "config.json").write_text(json.dumps(config | change))
    Path("no-tokenizer/tokenizer.model").unlink()
    Path("no-weights/model.safetensors").unlink()
    Path("cut/model.safetensors").write_bytes((BUNDLED / "model.safetensors").read_bytes()[:1_000_000])
    whole = tiny_gguf.read_bytes()
    Path("tiny.gguf").write_bytes(whole)
    Path("cut.gguf").write_bytes(whole[:9_000_000])
    Path("old.powerinfer.gguf").write_bytes(b"PWRI" + whole[4:])
    Path("model.bin").write_bytes(b"\x80\x02xx" + bytes(100))
    Path("latin1.txt").write_bytes("Gr\xfc\xdfe\n".encode("latin-1") * 50)
    Path("long.txt").write_text("word " * 2000)
    return tmp_path


def test_errors_are_quoted_as_they_are(run: Client, mishaps: Path) -> None:
    sparse = ("convert", BUNDLED, "u.gguf", "--calibration", "none", "--layout", "sparse")
    made, *failed = run.many(sparse, *(line.split() for line in PROVOKED), cwd=mishaps)
    assert made.returncode == 0, made.stderr
    quoted = [re.compile(".*?".join(map(re.escape, re.split(r"\.\.\.|\d+", line)))) for line in ERRORS]
    for command, done in zip(PROVOKED, failed, strict=True):
        error = next(line for line in done.stderr.splitlines() if line.startswith("error: "))
        assert done.returncode == 1
        assert any(line.fullmatch(error.replace("NONE0", "CUDA0")) for line in quoted), (
            f"{command}: {error} is not there"
        )


def test_every_quoted_error_is_in_the_source() -> None:
    known = [pattern for program in ("convert", "predictors", "runtime") for pattern in messages(ROOT / program)]
    for line in ERRORS:
        text = line.removeprefix("error: ")
        by_others = text.startswith("unrecognized arguments") or text.endswith("No such file or directory")
        assert by_others or any(pattern.fullmatch(text) for pattern in known), f"no message like `{line}`"


def messages(folder: Path) -> Iterator[re.Pattern[str]]:
    """Each string of the source with enough words of its own, what is filled in standing open."""
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node] if isinstance(node, ast.Constant) else []
            fixed = [
                part.value if isinstance(part, ast.Constant) and isinstance(part.value, str) else None for part in parts
            ]
            if len(re.findall(r"[a-z]", " ".join(filter(None, fixed)))) >= 6:
                yield re.compile("".join(".*" if text is None else re.escape(text) for text in fixed), re.DOTALL)
