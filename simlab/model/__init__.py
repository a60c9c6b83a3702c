"""What is computed: norms, attention, feed-forward, norm placement, the transformer."""
