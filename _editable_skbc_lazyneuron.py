"""Shadows the shared environment editable hook."""
