"""Conversion without calibration: what tests of the converter itself want."""

from functools import partial

from convert import convert as _convert

PLAIN = ("--calibration", "none")
convert = partial(_convert, calibration="none")
