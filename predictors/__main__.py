"""The command line `python -m predictors`: the table of its verbs."""

from __future__ import annotations

import sys

from runtime.cli.verbs import Program, Verb

PROGRAM = Program(
    name="predictors",
    help="fit and judge activation predictors",
    about="Fit and judge activation predictors.",
    start="""\
Fit other predictors to a converted model, or see what a model's predictors are worth:

    python -m predictors fit MODEL.gguf OUT.gguf --kind lowrank
    python -m predictors evaluate MODEL.gguf TEXT""",
    verbs=(
        Verb("fit", "write a model file again with other predictors", "predictors.commands.fit"),
        Verb("evaluate", "measure a model's predictors on a text", "predictors.commands.evaluate", "show_evaluation"),
    ),
)
main = PROGRAM.main

if __name__ == "__main__":
    sys.exit(main())
