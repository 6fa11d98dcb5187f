"""Routing measured: offline over traces, live beside a peer and under faults, and its parts."""
