"""The colours of every figure, and the names of its curves."""

from __future__ import annotations

# Okabe and Ito's colours, told apart by the colour-blind; the first three are the named curves'.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A7A7A", "#000000")
COLOURS = {
    "random": PALETTE[0], "checkpoint": PALETTE[1], "model": PALETTE[1], "theory": PALETTE[2],
}  # fmt: skip
LABELS = {
    "random": "random init", "checkpoint": "checkpoint", "model": "model", "theory": "theory",
}  # fmt: skip
