"""The predicted curve of a run's random inits, from the config and the tokens alone."""

from __future__ import annotations

from simlab.experiment.prepare import Prepared
from simlab.theory.mean_field import Prediction, predict, unpredictable


def predicted(ready: Prepared) -> Prediction:
    """The prediction for a run's random inits; where there is none, no rows, and the reason."""
    model, ids = ready.config.shape, ready.tokens
    reason = unpredictable(model, ids)
    if reason:
        return Prediction([], reason)
    return predict(model, ready.config.init, ids, gradients=ready.config.gradients)
