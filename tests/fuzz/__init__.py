"""Damaged input of every kind, many a second: see docs/fuzzing.md."""
