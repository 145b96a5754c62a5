"""C libraries through ctypes: ggml, libllama and our own sparse kernels."""
