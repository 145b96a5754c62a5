"""The command lines of `python -m predictors`: each module parses and prints what a library module computes."""
