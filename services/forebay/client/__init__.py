"""Typed Python client of the public gRPC service."""

from forebay.client.client import Event, ForebayClient

__all__ = ["Event", "ForebayClient"]
