#!/usr/bin/env python3
"""Stand in for llama.cpp's `llama-server` in its own tests: take its flags, start our server.

$LAZYNEURON_PYTHON is the interpreter, $LAZYNEURON_MODEL the model. The tests' own models are not looked for. Flags that
we have no counterpart of are dropped, and said on stderr. See tests/outside/README.md.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONTEXT = 1024  # of the bundled model; some tests want more, and use less

# What llama.cpp takes where neither the model nor the command names a template.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SAME = {
    "--port": "--port",
    "--host": "--host",
    "--temp": "--temp",
    "--seed": "--seed",
    "--alias": "--alias",
    "--n-predict": "--max-tokens",
    "--threads": "--threads",
    "--parallel": "--parallel",
    "--api-key": "--api-key",
}


def arguments(given: list[str]) -> list[str]:
    """Arguments of `python -m runtime serve` for those of llama-server."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    for flag in (*SAME, "--chat-template", "--chat-template-file", "--cors-origins"):
        parser.add_argument(flag)
    parser.add_argument("--ctx-size", type=int)
    for flag in ("--kv-unified", "--no-ui"):
        parser.add_argument(flag, action="store_true")
    known, dropped = parser.parse_known_args(given)
    values = vars(known)
    if known.n_predict == "-1":  # no limit: what ours does where nothing is said
        values["n_predict"] = None
    made = [text for flag, ours in SAME.items() for text in _pair(ours, values[flag[2:].replace("-", "_")])]
    if known.ctx_size:
        # llama.cpp divides its context between the slots, unless it is one pool; ours is that of a request.
        share = min(known.ctx_size if known.kv_unified else known.ctx_size // int(known.parallel or 1), CONTEXT)
        made += ["--n-ctx", str(share), *(["--n-cells", str(known.ctx_size)] if known.kv_unified else [])]
    made += ["--no-page"] if known.no_ui else []
    made += _pair("--cors-origin", known.cors_origins)
    made += ["--chat-template", str(Path(known.chat_template_file or _template(known.chat_template)).resolve())]
    if dropped:
        print("dropped:", *dropped, file=sys.stderr)
    return made


def _pair(flag: str, value: str | None) -> list[str]:
    return [] if value is None else [flag, value]


def _template(given: str | None) -> str:
    """File of a template that was given as text; ChatML where it was one of llama.cpp's names, or none."""
    text = given if given and not re.fullmatch("[a-z0-9.-]+", given) else CHATML
    with tempfile.NamedTemporaryFile("w", suffix=".jinja", delete=False) as file:
        file.write(text)
    return file.name


if __name__ == "__main__":
    command = [os.environ.get("LAZYNEURON_PYTHON", sys.executable), "-m", "runtime", "serve"]
    model = os.environ.get("LAZYNEURON_MODEL", str(ROOT / "build/tiny-relu-llama.gguf"))
    command += [model, *arguments(sys.argv[1:])]
    os.chdir(ROOT)
    os.execv(command[0], command)
