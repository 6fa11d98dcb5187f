"""Typed Python client of the public gRPC service, and of the gateway's explanations."""

from forebay.client.client import Event, ForebayClient
from forebay.client.explain import fetch_explanation

__all__ = ["Event", "ForebayClient", "fetch_explanation"]
