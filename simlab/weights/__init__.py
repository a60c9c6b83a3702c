"""Where a model's numbers come from: a random init or a checkpoint."""
