"""Model files: GGUF read, checked and written, whole or in shards, and the description of a model that they hold."""
