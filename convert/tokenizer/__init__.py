"""A checkpoint's tokenizer as a GGUF vocabulary."""
