"""The command lines of `python -m convert`: each module parses and prints what a library module computes."""
