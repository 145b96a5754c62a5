"""Measurements beside llama.cpp: same machine, same run, same weights, ratios. Never imported by the product."""
