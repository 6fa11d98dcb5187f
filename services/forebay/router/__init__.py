"""Chooses workers for a request: pure functions over a view of the fleet."""
