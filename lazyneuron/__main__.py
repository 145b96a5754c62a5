"""The command line `lazyneuron`, also `python -m lazyneuron`: the runtime's verbs, and the other programs as verbs."""

from __future__ import annotations

import sys

from convert.__main__ import PROGRAM as CONVERT
from predictors.__main__ import PROGRAM as PREDICTORS
from runtime.__main__ import PROGRAM as RUNTIME
from runtime.cli.verbs import Program

PROGRAM = Program(
    name="lazyneuron",
    help="all commands",
    about="Convert ReLU-family language models and run them, skipping the neurons that are zero.",
    start="""\
Convert a Hugging Face checkpoint, and talk to it:

    lazyneuron convert SparseLLM/ReluLLaMA-7B relullama-7b.gguf --type q8_0
    lazyneuron chat relullama-7b.gguf""",
    verbs=RUNTIME.verbs,
    programs=(CONVERT, PREDICTORS),
)


def main() -> int:
    """Run the command line; returns the exit status."""
    return PROGRAM.main(prog="lazyneuron")


if __name__ == "__main__":
    sys.exit(main())
