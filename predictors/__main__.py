"""`python -m predictors`."""

import os
import sys

# Before ggml loads OpenMP: threads that wait longer than this sleep, or a machine with other work stalls at every operator (docs/predictors.md).
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from predictors.cli import configure_parser, main
from runtime.cli.completion import offer_completions

if __name__ == "__main__":
    offer_completions(configure_parser)
    sys.exit(main())
