"""`python -m runtime report`: one HTML page that shows what a model file holds, and where a device of any size would
put it.
"""

from __future__ import annotations

from pathlib import Path

from runtime.analysis.page import ASSUMED, page_of
from runtime.base.atomic import check_target, new_path, replacing
from runtime.base.figures import size
from runtime.cli.machine import MachineOptions, add_machine
from runtime.cli.options import add_json, add_model, writes
from runtime.cli.output import note, print_json
from runtime.cli.parser import Parser
from runtime.errors import UserError
from runtime.model_file.reader import GgufFile
from runtime.report.page import write_page

_SUFFIXES = (".html", ".htm")


def configure_parser(parser: Parser) -> None:
    """Options of `report`."""
    add_model(parser)
    parser.add_argument("out", metavar="OUT.html", type=new_path, help="the page")
    parser.add_argument("--force", action="store_true", help="replace OUT.html if it exists")
    writes(parser, "out")
    add_machine(
        parser,
        "where the slider begins, e.g. 8 or 800MiB (half of what the whole model takes)",
        f"of the device's memory (measured; without a device {ASSUMED / 1e9:g} is assumed, for illustration)",
        " (measured)",
        disk=True,
    )
    add_json(parser)


def report(model: Path, out: Path, machine: MachineOptions, force: bool = False, as_json: bool = False) -> None:
    """Write one page, without any network, that shows a model's structure, bytes, neurons and predictors, and its
    placement at any budget of a device.
    """
    if out.suffix.lower() not in _SUFFIXES:
        raise UserError(f"`{out}`: expected a name that ends in {' or '.join(_SUFFIXES)}")
    check_target(out, 0, force, "report.html")
    with GgufFile(model) as file:
        check_target(out, 0, force, inputs=[part.path for part in file.parts])
        run = machine.run.for_file(file)
        facts = page_of(file, run, machine.run.threads, machine.device, machine.budgets, machine.figures)
    page = write_page(facts).encode("utf-8")
    with replacing(out) as partial:
        partial.write_bytes(page)
    note(f"`{out}`: written, {size(len(page))}")
    if as_json:
        print_json(facts)
