"""Shared state outside the processes; the only importer of redis."""
