"""A worker: one engine behind a gRPC listener, in the prefill pool, the decode pool, or both."""
