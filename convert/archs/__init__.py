"""One architecture family per file: a module with a frozen `ARCH`. Listed, not registered."""
