"""Reading what Ray Serve and its helper say about failures. No ray here."""

from __future__ import annotations

import json


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


def helper_error(out: bytes) -> str:
    """What a run of `serve_apps` has printed as its `error`; empty when it gave none."""
    for line in reversed(out.splitlines()):
        try:
            return str(json.loads(line)["error"])
        except (ValueError, KeyError, TypeError):
            continue
    return ""
