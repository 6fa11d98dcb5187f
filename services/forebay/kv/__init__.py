"""KV memory as bookkeeping: block hashes, the block pool with its prefix cache, leases."""
