"""Models by their name on the Hub: huggingface_hub itself, against a Hub on this machine (tests/hub_server.py)."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hub_client import ROOT, Client
from hub_server import TOKEN, Hub

from runtime.errors import UserError
from runtime.hub.locate import locate
from runtime.hub.names import Listing, Reference, RemoteFile, choose_model, parse
from runtime.model_file.reader import GgufFile
from runtime.model_file.shard_writer import split_model
from runtime.model_file.writer import copied, copied_keys, write_files

Converted = Callable[..., Path]


def fetched(run: Client, *names: str, **env: str) -> list[bytes]:
    """The bytes of the files that names stand for, as a command sees them."""
    found = run.many(*(("runtime", "inspect", name, "--json") for name in names), **env)
    return [Path(json.loads(done.out)["path"]).read_bytes() for done in found]


def inspect(*names: str) -> list[tuple[str, ...]]:
    """The commands that look at models."""
    return [("runtime", "inspect", name) for name in names]


# --- names -----------------------------------------------------------------------------------------------------------


def test_names() -> None:
    for text, expected in {
        "user/repo": Reference("user/repo"),
        "user/repo:q4_0": Reference("user/repo", None, "q4_0"),
        "user/repo:sub/m.gguf": Reference("user/repo", None, "sub/m.gguf"),
        "user/repo@v1:q4_0": Reference("user/repo", "v1", "q4_0"),
        "hf://user/repo": Reference("user/repo"),
        "hf://user/repo.gguf": Reference("user/repo.gguf"),
        "hf://user/repo@v1.0/sub/m.gguf": Reference("user/repo", "v1.0", "sub/m.gguf"),
        "hf://user/repo/m.gguf": Reference("user/repo", None, "m.gguf"),
        "hf://user/repo@refs/pr/3/m.gguf": Reference("user/repo", "refs/pr/3", "m.gguf"),
        "hf://user/repo@feature%2Fx": Reference("user/repo", "feature/x"),
        str(Path("hf://user/repo")): Reference("user/repo"),
        "https://huggingface.co/user/repo": Reference("user/repo"),
        "https://huggingface.co/user/repo/tree/main": Reference("user/repo"),
        "https://huggingface.co/user/repo/tree/main/sub": Reference("user/repo", None, "sub"),
        "http://www.huggingface.co/user/repo/": Reference("user/repo"),
        "huggingface.co/user/repo?library=transformers#how-to": Reference("user/repo"),
        "https://hf.co/user/repo/tree/refs%2Fpr%2F3": Reference("user/repo", "refs/pr/3"),
        "https://huggingface.co/user/repo/blob/v1/sub/m.gguf": Reference("user/repo", "v1", "sub/m.gguf"),
        "https://huggingface.co/user/repo/resolve/main/m%20q4.gguf?download=true": Reference(
            "user/repo", None, "m q4.gguf"
        ),
        str(Path("https://huggingface.co/user/repo")): Reference("user/repo"),
        "https://huggingface.co/user/repo.git": Reference("user/repo"),
        "git@hf.co:user/repo.git": Reference("user/repo"),
        "HTTPS://HuggingFace.co/User/repo": Reference("User/repo"),
        "https://huggingface.co/api/models/user/repo": Reference("user/repo"),
        "https://huggingface.co/user/repo/commit/0a1b": Reference("user/repo", "0a1b"),
        "https://huggingface.co/user/repo/discussions/3#c": Reference("user/repo"),
    }.items():
        assert parse(text) == expected, text
    for text in ("model.gguf", "folder/model.gguf", "./user/repo", "/user/repo", "../user/repo", "a/b/c", "model", ""):
        assert parse(text) is None, text
    for text in ("hf://user", "hf://", "hf://user/repo@"):
        with pytest.raises(UserError, match="expected hf://user/repo@revision/file"):
            parse(text)
    for text in ("https://huggingface.co/datasets/user/repo", "https://hf.co/spaces/user/repo/tree/main"):
        with pytest.raises(UserError, match=r"no address of a model, expected https://huggingface\.co/USER/REPO"):
            parse(text)


def listing(names: list[str], wanted: str = "", **more: object) -> Listing:
    files = {name: RemoteFile(1_500_000_000) for name in names}
    return Listing(Reference("user/repo", None, wanted), "0" * 40, files, **more)  # type: ignore[arg-type]


SHARDS = [f"big-q8_0-{i:05}-of-00003.gguf" for i in (1, 2, 3)]


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("q4_0", ["m-q4_0.gguf"]), ("Q4_K", ["m-Q4_K.gguf"]), ("q4_k_m", ["sub/m_q4_k_m.gguf"]), ("iq4_0", ["m-iq4_0.gguf"]),
        ("q8_0", SHARDS), (SHARDS[0], SHARDS), (SHARDS[1], SHARDS), ("m_q4_k_m.gguf", ["sub/m_q4_k_m.gguf"]), ("sub/m_q4_k_m.gguf", ["sub/m_q4_k_m.gguf"]), ("sub", ["sub/m_q4_k_m.gguf"]),
    ],
)  # fmt: skip
def test_a_type_or_a_file_chooses(wanted: str, expected: list[str]) -> None:
    names = [
        "README.md",
        "m-q4_0.gguf",
        "m-Q4_K.gguf",
        "m-iq4_0.gguf",
        "sub/m_q4_k_m.gguf",
        *SHARDS,
        "model.safetensors",
    ]
    assert choose_model(listing(names, wanted)) == expected


def refusal(found: Listing) -> str:
    with pytest.raises(UserError) as caught:
        choose_model(found)
    return f"{caught.value.message}\n{caught.value.hint}"


def test_what_cannot_be_chosen() -> None:
    both = ["m-q4_0.gguf", *SHARDS]
    assert refusal(listing(both)) == (
        "`user/repo`: 2 GGUF models to choose from: big-q8_0-00001-of-00003.gguf (4.50 GB), m-q4_0.gguf (1.50 GB)\n"
        "choose one, for example user/repo:q8_0"
    )
    assert "no GGUF file fits `q5_0`; it has big-q8_0" in refusal(listing(both, "q5_0"))
    assert "2 GGUF models that fit `q4_0`: a-q4_0.gguf" in refusal(listing(["a-q4_0.gguf", "b-q4_0.gguf"], "q4_0"))
    assert refusal(listing(["a-q4_0.gguf", "b-q4_0.gguf"])).endswith("for example user/repo:a-q4_0.gguf")
    assert refusal(listing(["model.safetensors"])).endswith("python -m convert user/repo OUT.gguf")
    assert "no GGUF file in it" in refusal(listing(["README.md"]))
    assert "2 of the 3 shards" in refusal(listing(SHARDS[:2]))
    assert "is for `llama`, expected `lazyneuron`" in refusal(listing(["m.gguf"], architecture="llama"))
    assert choose_model(listing(both, "q4_0", architecture="llama")) == ["m-q4_0.gguf"]


def test_a_local_path_is_never_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user").mkdir()
    (tmp_path / "user/repo").write_bytes(b"GGUF")
    assert locate("user/repo") == Path("user/repo")
    assert locate("user/none.gguf") == Path("user/none.gguf")


# --- fetching --------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(converted: Converted) -> bytes:
    return converted("llama-gqa", "q8_0").read_bytes()


def test_only_what_is_needed_and_later_offline(hub: Hub, run: Client, small: bytes, converted: Converted) -> None:
    other = converted("llama-gqa", "f16").read_bytes()
    files = {"m-q8_0.gguf": small, "m-f16.gguf": other, "model.safetensors": b"x", "README.md": b"A card."}
    hub.add("user/repo", files)
    first, several = run.many(("runtime", "inspect", "user/repo:q8_0", "--json"), *inspect("user/repo"))
    assert Path(json.loads(first.out)["path"]).read_bytes() == small
    assert f"m-f16.gguf ({len(other) / 1e3:.2f} kB), m-q8_0.gguf ({len(small) / 1e3:.2f} kB)" in several.complaint
    assert several.complaint.endswith("for example user/repo:f16")
    assert hub.storage.sent == len(small)
    assert not [r for r in hub.requests if "resolve" in r.path and "m-q8_0.gguf" not in r.path]

    hub.requests.clear()
    # The second name fits only one file of those in the cache.
    assert fetched(run, "user/repo:q8_0", "user/repo", HF_HUB_OFFLINE="1") == [small, small]
    absent, unknown = run.many(*inspect("user/repo:f16", "user/other"), HF_HUB_OFFLINE="1")
    why = "HF_HUB_OFFLINE is set"
    assert (
        f"`user/repo` (its copy in the cache: {why}): no GGUF file fits `f16`; it has m-q8_0.gguf" in absent.complaint
    )
    assert why in unknown.complaint
    assert not hub.requests


def test_every_command_takes_a_name(hub: Hub, run: Client, fitted_gguf: Path, tmp_path: Path) -> None:
    hub.add("user/repo", {"m.gguf": fitted_gguf.read_bytes()})
    text = tmp_path / "text.txt"
    text.write_text("We the people of the United States. " * 20)
    machine = ("--vram-budget", "1", "--device-bandwidth", "500", "--cpu-bandwidth", "50")
    commands = (
        ("complete", "user/repo", "-p", "We", "-n", "2"), ("perplexity", "user/repo", text, "--tokens", "32"), ("sparsity", "user/repo"),
        ("plan", "user/repo", *machine), ("chat", "user/repo", "-n", "1"), ("inspect", "user/repo"),
    )  # fmt: skip
    *found, judged = run.many(
        *(("runtime", *command) for command in commands), ("predictors", "evaluate", "user/repo", text), stdin="Hello\n"
    )
    assert all(done.out for done in found)
    assert f"`{text}`: 161 tokens" in judged.stderr  # the model was found: the text is what it complains about
    assert hub.storage.sent == fitted_gguf.stat().st_size
    (tmp_path / "script.py").write_text("import runtime\nwith runtime.load('user/repo') as m: print(m.ffn)\n")
    assert run("script", cwd=tmp_path).out == "predicted\n"


def test_shards_are_fetched_together(hub: Hub, run: Client, fitted_gguf: Path, tmp_path: Path) -> None:
    with GgufFile(fitted_gguf) as file:
        streams = [copied(file, name) for name in file.tensors]
        files = split_model(tmp_path / "m.gguf", copied_keys(fitted_gguf), streams, file.size // 3)
        write_files(files)
    hub.add("user/repo", {f"sub/{file.path.name}": file.path.read_bytes() for file in files})
    report = json.loads(run("runtime", "inspect", "user/repo", "--json").out)
    assert report["bytes"] == sum(file.path.stat().st_size for file in files)
    assert report["path"].endswith(f"sub/m-00001-of-{len(files):05}.gguf")


def test_revisions(hub: Hub, run: Client, small: bytes, converted: Converted) -> None:
    old = converted("llama-gqa", "f16").read_bytes()
    first = hub.add("user/repo", {"m.gguf": old}).branches["main"]
    hub.add("user/repo", {"m.gguf": small})
    hub.add("user/repo", {"m.gguf": old}, branch="v1")
    names = ("user/repo", f"hf://user/repo@{first}/m.gguf", "hf://user/repo@v1/m.gguf")
    assert fetched(run, *names) == [small, old, old]
    assert fetched(run, "user/repo@v1", "user/repo", HF_HUB_OFFLINE="1") == [old, small]
    assert "no such branch, tag or commit" in run("runtime", "inspect", "user/repo@v2").complaint


def test_three_dropped_connections(hub: Hub, run: Client, converted: Converted) -> None:
    model = converted("bundled", "f32").read_bytes()
    hub.add("user/repo", {"m.gguf": model})
    hub.storage.drops, hub.storage.drop_after = 3, 11_000_000  # the client writes 10 MiB at a time
    assert fetched(run, "user/repo") == [model]
    ranges = [request.headers.get("range") for request in hub.storage.seen("GET")]
    assert ranges == [None, *(f"bytes={10 * 2**20 * i}-" for i in (1, 2, 3))]
    assert hub.storage.sent < len(model) + 3 * 1_000_000


def test_an_interrupt_stops_a_download_at_once(hub: Hub, run: Client, small: bytes, tmp_path: Path) -> None:
    hub.add("user/repo", {"m.gguf": small})
    hub.storage.pause = 3600.0
    command = [sys.executable, "-m", "runtime", "inspect", "user/repo"]
    with subprocess.Popen(command, cwd=ROOT, env=run.environment(), stderr=subprocess.PIPE, text=True) as process:
        while not hub.storage.sent:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=600) == (None, "interrupted\n")
        assert process.returncode == 130
    hub.storage.pause = 0.0
    assert fetched(run, "user/repo") == [small]


def test_progress_is_shown_on_a_terminal_only(hub: Hub, run: Client, small: bytes, tmp_path: Path) -> None:
    hub.add("user/repo", {"m.gguf": small})
    command = [sys.executable, "-m", "runtime", "inspect", "user/repo", "--json"]
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    done = subprocess.run(command, cwd=ROOT, env=run.environment(), stdout=subprocess.PIPE, stderr=theirs, check=True)
    os.close(theirs)
    shown = os.read(ours, 100_000).decode()
    os.close(ours)
    assert "100%|" in shown
    assert json.loads(done.stdout)["bytes"] == len(small)
    assert run("runtime", "inspect", "user/repo", HF_HOME=str(tmp_path / "other")).stderr == ""


def test_a_wrong_sha256(hub: Hub, run: Client, small: bytes, tmp_path: Path) -> None:
    hub.add("user/repo", {"m.gguf": small})
    oid = hashlib.sha256(small).hexdigest()
    hub.storage.damaged.add(oid)
    text = run("runtime", "inspect", "user/repo").complaint
    assert f"expected {oid} as the Hub says" in text
    assert not [path for path in (tmp_path / "home").rglob("*") if path.is_file() and path.stat().st_size == len(small)]
    assert run("runtime", "inspect", "user/repo", HF_HUB_OFFLINE="1").complaint
    hub.storage.damaged.clear()
    assert fetched(run, "user/repo") == [small]


def test_a_file_is_hashed_once_and_again_when_it_changes(hub: Hub, run: Client, small: bytes, tmp_path: Path) -> None:
    hub.add("user/repo", {"m.gguf": small})
    fetched(run, "user/repo")
    content = next(path for path in (tmp_path / "home").rglob("blobs/*") if path.stat().st_size == len(small))
    state = content.stat()
    content.write_bytes(small[:-1] + bytes([small[-1] ^ 1]))
    os.utime(content, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert fetched(run, "user/repo") != [small]  # neither size nor time tells: it was not read again
    os.utime(content)
    assert "as the Hub says" in run("runtime", "inspect", "user/repo", HF_HUB_OFFLINE="1").complaint


def test_the_token_goes_to_the_hub_only(hub: Hub, run: Client, small: bytes) -> None:
    hub.add("user/repo", {"m.gguf": small}, private=True)
    refused = run("runtime", "inspect", "user/repo").complaint
    assert "no such repository on the Hub (or a private one)" in refused
    assert "HF_TOKEN" in refused
    assert fetched(run, "user/repo", HF_TOKEN=TOKEN) == [small]
    assert hub.seen("GET")[-1].headers["authorization"] == f"Bearer {TOKEN}"
    assert hub.storage.requests
    hub.moved.add("user/elsewhere")
    assert run("runtime", "inspect", "user/elsewhere", HF_TOKEN=TOKEN).returncode == 1
    assert hub.storage.seen("GET", "/api/models/user/elsewhere")
    assert not [r for r in hub.storage.requests if TOKEN in str(r.headers) or TOKEN in r.path]


def test_a_file_for_another_program_is_not_fetched(hub: Hub, run: Client, small: bytes) -> None:
    hub.add("user/repo", {"m.gguf": small})
    hub.architecture = "llama"
    assert "is for `llama`, expected `lazyneuron`" in run("runtime", "inspect", "user/repo").complaint
    assert not hub.storage.requests


def test_without_a_network_the_cache_serves(hub: Hub, run: Client, small: bytes) -> None:
    hub.add("user/repo", {"m.gguf": small})
    fetched(run, "user/repo")
    here, elsewhere = run.many(*inspect("user/repo", "user/other"), HF_ENDPOINT="http://127.0.0.1:9")
    assert here.out
    assert here.stderr == "note: the Hub cannot be reached: using the copy of `user/repo` in the cache\n"
    assert "nothing of it in the cache" in elsewhere.complaint


def test_refusals(hub: Hub, run: Client) -> None:
    hub.refused = {"user/gated": (403, "GatedRepo"), "user/none": (404, "RepoNotFound"), "user/down": (503, "")}
    gated, none, down = run.many(*inspect(*hub.refused))
    assert "access to it must be granted first" in gated.complaint
    assert "no such repository on the Hub" in none.complaint
    assert "the Hub answered 503" in down.complaint
