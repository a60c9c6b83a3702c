"""Curves, fits and verdicts from stored rows; no torch."""
