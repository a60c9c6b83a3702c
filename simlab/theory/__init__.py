"""Closed-form laws of the residual stream; numpy only."""
