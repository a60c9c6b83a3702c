"""Mean-field theory: what a random init's curve is on average over seeds, and how far seeds differ.

docs/theory.md has the equations and where they don't hold.
"""

from simlab.theory.mean_field.limits import unpredictable
from simlab.theory.mean_field.recursion import PredictedRow, Prediction, predict

__all__ = ["PredictedRow", "Prediction", "predict", "unpredictable"]
