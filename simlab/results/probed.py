"""What ``simlab.probe`` gives: a run's result, of a model that is in memory."""

from __future__ import annotations

import html
import warnings
from collections.abc import Mapping
from typing import Any

import pandas as pd

from simlab.analysis.headline import headline
from simlab.config import ConfigError
from simlab.experiment.batches import MeasuredCurves
from simlab.experiment.probed import probed_result
from simlab.measurement.model_probe import LAYOUT, NOT_FINITE_FROM, ModelProbe
from simlab.results.run import Result
from simlab.store import plain_values


class Probed(Result):
    """A probed model's result: all that a run's has, and a context manager for your own forward calls.

    Example:

        r = simlab.probe(model, ids, random=8)
        r.verdict; r.plot("norm"); r.save("folder")
        with simlab.probe(model) as r:
            model(ids)
        r.rows()

    Attributes:
        curves: As a run's: a row per curve × seed × step. The model's curve is called ``model`` (or
            ``random`` or ``checkpoint``, if that is the name given to the probe), its random inits'
            ``random``.
        summary: As a run's summary.json, without what isn't known of such a model: config, theory.
        probe: The hooks, and what they measured.
    """

    def __init__(self, probe: ModelProbe, inits: MeasuredCurves, call: str) -> None:
        self.probe, self.inits, self.call = probe, inits, call
        self.found: tuple[pd.DataFrame, dict[str, Any], pd.DataFrame | None] | None = None
        self.seen = 0, 0  # tokens forward and back when that was found

    def __enter__(self) -> Probed:
        if self.inits:
            raise ConfigError(
                "probe: random inits have not seen the batches of a with block: pass a batch alone"
            )
        self.probe.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.probe.__exit__(*error)

    def _result(self) -> tuple[pd.DataFrame, dict[str, Any], pd.DataFrame | None]:
        seen = self.probe.embedding.tokens, self.probe.embedding_gradient.tokens
        if self.found is None or seen != self.seen:
            self.seen = seen
            curves, summary, streams = probed_result(self.probe, self.inits, self.call)
            self.found = curves, plain_values(summary), streams
        return self.found

    @property
    def curves(self) -> pd.DataFrame:
        """A row per curve × seed × step. Raises ConfigError where no forward call was seen."""
        return self._result()[0]

    @property
    def summary(self) -> Mapping[str, Any]:
        """As summary.json. Raises ConfigError where no forward call was seen."""
        return self._result()[1]

    @property
    def streams(self) -> pd.DataFrame | None:
        """The rows of streams.csv, of simlab's own model whose placement carries several vectors."""
        return self._result()[2]

    @property
    def layout(self) -> str:
        """Where the residual stream is, in one line: the blocks' steps, by the names of submodules."""
        return self.probe.layout

    def rows(self) -> pd.DataFrame:
        """``curves``, with the model's curve under the name that ``probe`` was given.

        NaN stands in columns that the model doesn't show. A curve that overflows ends before its first
        non-finite value, with a warning that says where; ``attrs["not_finite_from"]`` is then that
        sublayer of the model's. ``attrs["layout"]`` is ``layout``. Raises ConfigError where no forward
        call was seen, or one that didn't pass every step.
        """
        curves, summary, _ = self._result()
        rows, own = curves.copy(), self.probe.curve
        if own not in ("random", "checkpoint"):
            rows["curve"] = rows["curve"].replace("model", own)
        for row in summary["overflow"]:
            drawn = self.inits and row["curve"] == "random"
            name = f"random (seed {row['seed']})" if drawn else own
            place = f"sublayer {row['sublayer']} ({row['kind']})"
            warnings.warn(f"probe: curve {name} isn't finite from {place} on", stacklevel=2)
            if not drawn:
                rows.attrs[NOT_FINITE_FROM] = int(row["sublayer"])
        rows.attrs[LAYOUT] = self.layout
        return rows

    def __repr__(self) -> str:
        """Two lines: what it is about, and the answer; one before any forward call."""
        if self.probe.size is None:
            return f"<simlab probe of {type(self.probe.model).__name__}: no forward call yet>"
        return f"<simlab probe: {self.title}\n {headline(self.curves, self.summary)}>"

    def _repr_html_(self) -> str:
        if self.probe.size is None:
            return f"<p>{html.escape(repr(self)[1:-1])}</p>"
        return super()._repr_html_()
