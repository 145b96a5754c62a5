"""Computing on the CPU: weights in memory, blocks as ggml graphs, and what these cost."""
