"""Panels placed by hand: ticks of log axes, and labels that no line crosses."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from simlab.report.growth_figure import growth_figure
from simlab.report.panels import log_ticks, panel


@pytest.mark.parametrize("low", [1e-5, 0.85, 0.999, 1.2, 2.05, 7.3, 640.0])
@pytest.mark.parametrize("span", [1.0, 1.0001, 1.01, 1.1, 1.5, 2.4, 2.6, 6.0, 30.0, 1e5])
def test_log_axes_have_a_scale(low, span):
    """Two labels or more, each its own, however narrow the range."""
    ax = panel(Figure(figsize=(4, 3)), (0.5, 0.5, 3, 1.5), "", "", log=True)
    ax.set_ylim(low, low * span * (1 + 1e-9))
    log_ticks(ax)
    bottom, top = ax.get_ylim()
    assert (bottom <= low, top >= low * span) == (True, True)
    shown = [tick for tick in ax.get_yticks() if bottom <= tick <= top]
    labels = [ax.yaxis.get_major_formatter()(tick, None) for tick in shown]
    assert len(set(labels)) == len(labels) >= 2


def departed(at, growth):
    """A checkpoint that leaves nine random inits, which don't grow, for good at sublayer ``at``."""
    steps, rows = np.arange(13), []
    for curve, seed in [("checkpoint", 0), *(("random", seed) for seed in range(9))]:
        left = curve == "checkpoint"
        v = np.where(left & (steps >= at), 1 + growth * (steps - at + 1), 1 + 0.01 * (seed - 4) / 4)
        rows.append(pd.DataFrame({
            "curve": curve, "seed": seed, "sublayer": steps,
            "kind": ["embedding", *["attention", "mlp"] * 6],
            "block": pd.array([pd.NA, *np.repeat(range(6), 2)], dtype="Int64"), "mean_square": v,
            "norm": np.sqrt(v), "law_sqrt2": v[0] * np.sqrt(2.0) ** steps, "massive": 0,
            "outside": np.where(left, steps >= at, np.nan), "branch_mean_square": 1.0,
            "delta_branch": 1.0, "delta_cross": 0.0,
            **{f"mean_square_{part}": v for part in ("median", "p05", "p95", "first", "rest", "max")},
        }))  # fmt: skip
    return pd.concat(rows, ignore_index=True)


@pytest.mark.parametrize(("at", "growth"), [(0, 0.4), (0, 2.0), (5, 0.4), (8, 0.3), (8, 3.0)])
def test_no_line_crosses_the_departure(at, growth):
    figure = growth_figure(departed(at, growth), "t", ["a"])
    renderer = FigureCanvasAgg(figure).get_renderer()
    ax = figure.axes[0]
    (label,) = [text for text in ax.texts if text.get_text().startswith("outside")]
    box = label.get_window_extent(renderer)
    curves = [line for line in ax.lines if np.size(line.get_xdata()) == 13]
    assert len(curves) == 3
    for line in curves:
        x, y = ax.transData.transform(np.column_stack(line.get_data())).T
        on = np.interp(np.linspace(box.x0, box.x1, 99), x, y)
        assert not ((box.y0 < on) & (on < box.y1)).any()
