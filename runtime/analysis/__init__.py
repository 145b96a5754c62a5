"""What can be said of a model: each module computes one kind of figures and returns plain values. Commands print
them.
"""
