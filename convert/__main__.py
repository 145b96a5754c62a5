"""The command line `python -m convert`: the table of its verbs."""

from __future__ import annotations

import sys

from runtime.cli.verbs import Program, Verb

PROGRAM = Program(
    name="convert",
    help="convert a checkpoint to one GGUF file, and share it",
    about="Convert a Hugging Face ReLU checkpoint or a PowerInfer file to one GGUF file for lazyneuron.",
    start="""\
Give a Hugging Face checkpoint and a file to write:

    python -m convert SparseLLM/ReluLLaMA-7B relullama-7b.gguf --type q8_0
    python -m convert prosparse-llama-2-7b prosparse.gguf      (short names: python -m convert --list)
    python -m convert path/to/checkpoint model.gguf

then run it with `python -m runtime chat model.gguf`, and share it:

    python -m convert push model.gguf user/repo

All options: python -m convert --help""",
    # A folder of such a name is ./card or ./push.
    verbs=(
        Verb("card", "write the model card of a converted file", "convert.commands.card"),
        Verb("push", "send a converted file to the Hub, with its card", "convert.commands.push"),
    ),
    plain=Verb("convert", "convert a checkpoint", "convert.commands.convert", "convert_source"),
)
main = PROGRAM.main

if __name__ == "__main__":
    sys.exit(main())
