"""Where random parameters come from: drawn densely, or weightless."""
