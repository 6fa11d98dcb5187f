"""Load against a running platform, and what became of it."""
