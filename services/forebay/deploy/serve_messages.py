"""Reading what Ray Serve says about a failed replica. No ray here."""

from __future__ import annotations


def root_cause(message: str) -> str:
    """The last line of the last traceback in Serve's message, without the class's module."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    cause = lines[-1]
    if cause.startswith("ActorDiedError"):
        return (
            "its process died; if memory ran out, take fewer workers, a smaller model"
            " or a smaller --kv-memory-mib"
        )
    head, separator, text = cause.partition(": ")
    if separator and head.startswith("forebay.core.errors."):
        return text
    return cause
