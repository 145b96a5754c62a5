"""A written file held against its checkpoint."""
