"""What is computed: norms, attention, MLP, residual steps, the transformer."""
