"""A model in stages: consecutive blocks, each computed by an engine of its own, on this machine or on several."""
