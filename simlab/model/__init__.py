"""The model: norms, attention, MLP, residual steps, the transformer."""
