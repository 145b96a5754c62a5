"""The command line `python -m runtime`: the table of its verbs."""

from __future__ import annotations

import sys

from runtime.cli.verbs import Program, Verb

PROGRAM = Program(
    name="runtime",
    help="run converted models",
    about="Run models converted by `python -m convert`.",
    start="""\
Talk to a model that `python -m convert` has made:

    python -m runtime chat MODEL.gguf""",
    verbs=(
        Verb("chat", "talk to a model", "runtime.commands.chat", aliases=("run",)),
        Verb("complete", "continue a prompt", "runtime.commands.complete"),
        Verb("devices", "list the devices that a model can be put on", "runtime.commands.devices", "show_devices"),
        Verb("inspect", "show what a model file holds", "runtime.commands.inspect"),
        Verb("perplexity", "measure how well a model predicts a text", "runtime.commands.perplexity"),
        Verb("plan", "show what a device would hold, and the speed to expect", "runtime.commands.plan"),
        Verb(
            "report", "write a page that shows it all: sizes, neurons, predictors, placement", "runtime.commands.report"
        ),
        Verb("serve", "answer many clients over HTTP, as OpenAI's servers do", "runtime.commands.serve"),
        Verb("sparsity", "show how unevenly the neurons of each layer fire", "runtime.commands.sparsity"),
    ),
)
main = PROGRAM.main

if __name__ == "__main__":
    sys.exit(main())
