"""Runs the command line."""

import os
import sys

# Before ggml loads OpenMP: threads that wait longer than this sleep, or a machine with other work stalls at every operator (docs/predictors.md).
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from convert.cli import complete_for_shell, main

if __name__ == "__main__":
    complete_for_shell()
    sys.exit(main())
