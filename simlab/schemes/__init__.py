"""A random model on paper: residual schemes and the stds that its matrices are drawn with."""
