#!/usr/bin/env python3
"""Run llama.cpp's own server tests against our server, and count how they end. See tests/outside/README.md.

The tests are copied, and in the copy some checks are widened: those of llama.cpp's build, of its test model's tokens,
and of what OpenAI's servers do otherwise. $OUTSIDE_STRICT=1 leaves them as they are.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent

# What they ask, what is asked in its place, and why.
WIDER = (
    (r'\.startswith\("b"\)', '.startswith("lazyneuron")', "the fingerprint names the program"),
    (r"== n_prompt\b", "> 0", "another vocabulary"),
    (r"assert len\(choice\['delta'\]\['content'\]\) > 0", "assert True", "OpenAI's first chunk has an empty text"),
    (r"(\.content|\[.content.\]) is None", r'\1 in (None, "")', "OpenAI's first chunk has an empty text"),
    (r'\["type"\] == "exceed_context_size_error"', '["code"] == "context_length_exceeded"', "OpenAI's word"),
    (r'OPTIONS(".*\n(?:.*\n){1,5}?.*)status_code == 200', r"OPTIONS\1status_code in (200, 204)", "no content"),
    (r"(assert .Process-Start-Time-Unix. in)", r"\1 res.headers or True  #", "time is a metric"),
)
FILES = [
    "basic",
    "chat_completion",
    "compat_anthropic",
    "compat_oai_responses",
    "completion",
    "ctx_shift",
    "ignore_eos",
    "metrics",
    "security",
    "template",
    "tokenize",
    "tool_call",
]


def main() -> int:
    """Run them; the exit status is 1 where none ran."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tests", type=Path, help="tools/server/tests of llama.cpp")
    parser.add_argument("--python", default=sys.executable, help="an interpreter with what the tests need")
    parser.add_argument("--report", type=Path, default=Path("build/outside-llama-cpp.jsonl"))
    parser.add_argument("--files", nargs="+", default=FILES, help="names of files, as in unit/test_NAME.py")
    given = parser.parse_args()
    given.report.parent.mkdir(parents=True, exist_ok=True)
    given.report.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        copy = copied(given.tests.resolve(), Path(folder))
        run(copy, given.python, given.report.resolve(), given.files)
    return told(given.report)


def copied(tests: Path, folder: Path) -> Path:
    """A copy of the tests at the same place beside llama.cpp's templates, with wider checks."""
    copy = folder / "tools/server/tests"
    shutil.copytree(tests, copy, ignore=shutil.ignore_patterns("__pycache__", "tmp"))
    (folder / "models").symlink_to(tests.parents[2] / "models")
    counts = collections.Counter[str]()
    for path in (copy / "utils.py", *copy.glob("unit/*.py")):
        text = path.read_text(encoding="utf-8")
        for pattern, put, why in () if os.environ.get("OUTSIDE_STRICT") else WIDER:
            text, n = re.subn(pattern, put, text)
            counts[why] += n
        path.write_text(text, encoding="utf-8")
    for why, n in counts.items():
        print(f"{n:4} checks are wider: {why}")
    return copy


def run(copy: Path, python: str, report: Path, files: list[str]) -> None:
    """Run the tests of some files, those without big models."""
    env = {**os.environ, "OUTSIDE_REPORT": str(report), "PYTHONPATH": f"{copy}:{HERE}"}
    env |= {"LLAMA_SERVER_BIN_PATH": str(HERE / "llama_server.py")}
    env.setdefault("LAZYNEURON_PYTHON", sys.executable)
    command = [python, "-m", "pytest", "-p", "loose", "-p", "no:cacheprovider", "-q", "--tb=short", "-m", "not slow"]
    timeout = ["--timeout", "60"]  # of pytest-timeout
    subprocess.run([*command, *timeout, *(f"unit/test_{name}.py" for name in files)], cwd=copy, env=env, check=False)


def told(report: Path) -> int:
    """Print how the tests of each file ended, and why some failed."""
    lines = [json.loads(line) for line in report.read_text().splitlines()] if report.exists() else []
    counts = collections.defaultdict[str, collections.Counter[str]](collections.Counter)
    for line in lines:
        file, outcome = line["test"].split("::")[0], line["outcome"]
        counts[file]["passed, but for texts" if outcome == "passed" and line["texts"] else outcome] += 1
        if outcome == "failed":
            print(f"{line['test'].partition('::')[2][:100]}: {' '.join(line['error'].split())[:160]}")
    for file, count in counts.items():
        print(f"{file}: {', '.join(f'{n} {outcome}' for outcome, n in sorted(count.items()))}")
    print(*(f"{n} {outcome}" for outcome, n in sum(counts.values(), collections.Counter()).items()), sep=", ")
    return 0 if lines else 1


if __name__ == "__main__":
    sys.exit(main())
