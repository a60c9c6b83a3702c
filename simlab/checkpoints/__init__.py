"""Checkpoints on disk and on the hub: their formats, streamed weights, fingerprints."""
