"""`python -m convert SOURCE --measure-sparsity`: a table on stdout, and where the figures come from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.measure import Measured, measure_sparsity
from runtime.base.figures import share
from runtime.cli.firing import check_plot, expert_table, firing_table, write_plot
from runtime.cli.output import console, note, print_json
from runtime.cli.progress import progress_bar
from runtime.errors import UserError

_TAKEN = {"type": "type", "ffn_type": "ffn_type", "calibration": "calibration", "calibration_tokens": "tokens"}
_TAKEN |= {"seed": "seed", "threads": "threads"}
_DEFAULTS = {"predictor_type": "auto"}  # of other options, where none is not what stands for not given


def print_measured(
    source: str | None, out: str | None, plot: Path | None, as_json: bool, options: Mapping[str, Any]
) -> None:
    """Measure and print. options: those of a conversion; plot: a file to draw to.

    Raises UserError for options that say how a file is to be written.
    """
    if source is None:
        raise UserError("SOURCE is missing", "python -m convert --help lists the options")
    if out is not None:
        raise UserError(f"`{out}`: --measure-sparsity writes no model, expected SOURCE alone", "leave one of them out")
    for name, value in options.items():
        if name not in (*_TAKEN, "force") and value not in (None, False, _DEFAULTS.get(name)):
            raise UserError(
                f"--{name.replace('_', '-')}: does not apply to --measure-sparsity", "leave one of the options out"
            )
    if options.get("calibration") == "none":
        raise UserError("--calibration none: --measure-sparsity needs a text", "leave one of the options out")
    check_plot(plot)
    with progress_bar() as progress:
        found = measure_sparsity(source, **{to: options[of] for of, to in _TAKEN.items()}, progress=progress)
    for text in found.notes:
        note(f"note: {text}")
    if plot is not None:
        write_plot(plot, found.frequencies, found.name)
    if as_json:
        print_json(found.to_json())
        return
    console().print(firing_table(f"neurons of {found.name}", ((i, found.layers[i]) for i in found.ffn_blocks)))
    if any(found.experts):
        console().print(expert_table(found.experts))
    print(_origin(found))


def _origin(found: Measured) -> str:
    """What the figures were measured on, and how long it took."""
    return (
        f"{share(found.active)} of the neurons that a token may use fire ({found.activation}), on {found.tokens:,} "
        f"tokens of {found.corpus} (sha256 {found.sha256[:12]}), matrices in {found.type}, {found.seconds:.0f} s"
    )
