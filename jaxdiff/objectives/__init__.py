"""Training objectives: (params, key, batch) ↦ per-example loss and metrics."""
