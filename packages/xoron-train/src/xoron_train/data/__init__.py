"""Text documents in, packed batches out; all state on the way is restored exactly."""
