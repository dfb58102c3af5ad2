"""Who owns the engine, and its clients."""
