"""The predicted curve of a run's random inits, from the config and the tokens alone.

With ``engine=theory`` it stands in place of measured ones, as the curve ``theory``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import pandas as pd

from simlab.analysis.curve import Curves, curves_of, with_laws
from simlab.config import ModelConfig
from simlab.experiment.prepare import Prepared
from simlab.schemes.placement import at
from simlab.theory.mean_field import Prediction, predict


def predicted(ready: Prepared, on_block: Callable[[], None] = lambda: None) -> Prediction:
    """The prediction for a run's random inits; where there is none, no rows, and the reason.

    on_block: as for ``predict``.
    """
    if reason := ready.unpredicted:
        return Prediction([], reason)
    config = ready.config
    return predict(
        config.shape, config.init, ready.tokens, gradients=config.gradients, on_block=on_block
    )


def predicted_curve(ready: Prepared, theory: Prediction) -> tuple[pd.DataFrame, Curves]:
    """The curve ``theory`` as rows of curve.csv, and as arrays: means over seeds, under the run's seed.

    It has the columns that theory knows. ``band_mean_field`` is the std of mean_square between seeds;
    ``law_mean_field`` stays empty, as the curve itself is that law.
    """
    model, entries = ready.config.shape, ready.entries
    frame = pd.DataFrame([asdict(row) for row in theory.rows])
    frame["block"] = frame["block"].astype("Int64")
    band = frame.pop("band")
    if not ready.config.gradients:
        frame = frame.drop(columns=["gradient_norm", "gradient_rms"])
    frame.insert(0, "curve", "theory")
    frame.insert(1, "seed", ready.config.seed)
    # E⟨x⟩², the mean over tokens and width of fresh weights, is the mean vector's E‖⟨x⟩‖²/width².
    spread = frame["mean_square"] - (frame["mean_vector_norm"] / model.width) ** 2
    at_square = list(frame).index("mean_square")
    frame.insert(at_square, "variance", spread * entries / (entries - 1))
    norms = [_last_norm(model, row.kind, row.block) for row in theory.rows]
    gain, normalises = zip(*norms, strict=True)
    curve = curves_of(frame, "theory", gain, normalises)
    return with_laws(frame, {"theory": curve}).assign(band_mean_field=band), curve


def _last_norm(model: ModelConfig, kind: str, block: int | None) -> tuple[float, str | None]:
    """A row's last norm, as laws take it: its gain at init, and what it acts on."""
    if block is None:
        return 1.0, None
    if kind == "renorm":
        return 1.0, "stream"
    return model.norm.gain, at(model, block, kind).normalises
