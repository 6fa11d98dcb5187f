"""Plain data and rules that every other package may import: no I/O, no third-party imports."""
