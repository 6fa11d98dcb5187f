"""Protocols, channels and the mapping of errors to status codes."""
