"""Checkpoints of every model type that transformers knows: its modules, filled a block at a time."""
