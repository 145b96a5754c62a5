"""The table of predictors, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from predictors.fit import Figures
from runtime.base.figures import share
from runtime.cli.output import new_table

_COLUMNS = ("active", "recall", "precision", "predicted", "energy kept", "bytes", "exact", "dense")


def layer_table(layers: Sequence[Figures], stored: Sequence[str] = ()) -> Table:
    """Figures of each layer's predictor; stored: what each is, for a column of its own."""
    table = new_table("layer", *(["predictor"] if stored else []), *_COLUMNS, left=("layer", "predictor"))
    for i, f in enumerate(layers):
        shares = (f.active_share, f.recall, f.precision, f.predicted_share, f.energy_kept)
        nbytes = (f.bytes_predicted, f.bytes_exact, f.bytes_dense)
        texts = [*(share(value, 2) for value in shares), *(f"{n:,.0f}" for n in nbytes)]
        table.add_row(str(i), *([stored[i]] if stored else []), *texts)
    return table
