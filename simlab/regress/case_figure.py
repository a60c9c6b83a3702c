"""NAME.png of a case: expected and new curves, and which sublayer fails which gate."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from simlab.analysis import LAWS
from simlab.config import printable
from simlab.regress.cases import Checked
from simlab.regress.gates import SIGNED, Finding, Outcome
from simlab.report.colours import COLOURS, PALETTE
from simlab.report.page.quantities import BY_SUBLAYER
from simlab.report.panels import (
    DIM,
    HALO,
    INK,
    log_ticks,
    name_ends,
    panel,
    plain,
    write_at,
)
from simlab.report.seeds import SeedTable, longest, over_seeds, x_of

RECORDED, GOT = PALETTE[6], PALETTE[1]
WIDTH, HEIGHT = 12.8, 4.9  # inches, of the figure and of its panels without titles
_STREAM = {  # what is shown beside the quantity that differs first: title, and what it is
    "norm": ("Norm ‖x‖", "mean over tokens"),
    "mean_square": ("Mean square of x", "over width and tokens"),
    "branch_mean_square": ("What a sublayer adds", "‖b‖²/d, as it is added"),
}
_LABEL = 0.115  # of the large panel's height, for a mark's name
_DOTS = 24  # steps, up to which each has its dot


@dataclass(frozen=True)
class Side:
    """One of the two sets of curves: rows with ``x``, their places on the axis, name and colour."""

    rows: pd.DataFrame
    label: str
    colour: str


def case_figure(checked: Checked) -> Figure:
    """The quantity that differs first, its difference, and the residual stream's norm and mean square.

    A dashed line stands where a gate finds the first difference, with the gates' names.
    """
    found = [o for o in checked.outcomes if o.finding is not None]
    first = next((o for o in found if _drawable(checked, o.finding)), None)
    there = [q for q in (*checked.case.quantities, "mean_square") if q in checked.expected]
    name = first.finding.quantity if first and first.finding else there[0]
    curve = _curve(checked, first, name)
    failing = [o for o in checked.outcomes if not o.passed]
    head = f"{checked.case.name}: {_count(len(failing), len(checked.outcomes))}"
    if found and found[0].finding:
        head += f", first at {found[0].finding.where}"
    lines = [f"{o.gate}: {o.why}." for o in failing]
    lines.append(f"The case runs {printable(checked.case.command)}")
    figure = _headed(head, lines)
    expected, got = _expected(checked, curve, name, first), _got(checked, curve, name)
    what = BY_SUBLAYER[name].label if name in BY_SUBLAYER else name
    ax = panel(
        figure, (0.65, 0.6, 5.2, 4.1), what[0].upper() + what[1:], f"{name} after each sublayer",
        log=_decades(expected, got, name),
    )  # fmt: skip
    _curves(ax, expected, got, name)
    ax.set_xlabel("sublayer (0: the embedding; a block has two)", fontsize=9, color=DIM)
    _marks(ax, found, named=True)
    name_ends(ax, [_name(side, name) for side in (expected, got) if side and len(side.rows)])
    if expected is not None:
        _difference(figure, expected, got, name, first, found)
    for left, other in zip((8.35, 10.85), [q for q in _STREAM if q != name], strict=False):
        if other in checked.got:
            box = (left, 0.6, 1.75, 1.55)
            _small(figure, box, checked, curve, other, first, found)
    return figure


def _count(failing: int, gates: int) -> str:
    if not failing:
        return "passes its gate" if gates == 1 else f"passes its {gates} gates"
    if failing == gates:
        return {1: "its gate fails", 2: "both gates fail"}.get(gates, f"all {gates} gates fail")
    return f"{failing} of its {gates} gates {'fails' if failing == 1 else 'fail'}"


def _headed(head: str, lines: Sequence[str]) -> Figure:
    """A figure with room for its panels below the headline and the lines."""
    heads = textwrap.wrap(head, 100)
    more = [part for line in lines for part in textwrap.wrap(line, 165)]
    height = HEIGHT + 0.72 + 0.28 * len(heads) + 0.2 * len(more)
    figure = Figure(figsize=(WIDTH, height), facecolor="white")
    for i, line in enumerate(heads):
        write_at(figure, 0.25, height - 0.38 - 0.28 * i, line, size=14, weight="bold")
    for i, line in enumerate(more):
        y = height - 0.38 - 0.28 * len(heads) - 0.2 * i
        write_at(figure, 0.25, y, line, size=9.5, colour=DIM)
    return figure


def _drawable(checked: Checked, finding: Finding | None) -> bool:
    """True if the curves have the finding's quantity: other steps than recorded have none."""
    if finding is None or finding.quantity not in checked.got:
        return False
    return finding.against is not None or finding.quantity in checked.expected


def _curve(checked: Checked, first: Outcome | None, name: str) -> str:
    """The kind of curve that is drawn: the one that isn't exact, else the random inits if there are."""
    f, got = first.finding if first else None, checked.got
    if first and f and first.gate == "exact" and math.isfinite(f.got):
        here = got[(got["sublayer"] == f.sublayer) & (got["kind"] == f.kind) & got[name].notna()]
        return str(here["curve"].iloc[int((here[name] - f.got).abs().argmin())])
    names = set(checked.expected["curve"])
    return "random" if "random" in names else str(checked.expected["curve"].iloc[0])


def _rows(frame: pd.DataFrame, curve: str, name: str) -> pd.DataFrame:
    """A curve's rows with this quantity, and their positions ``x`` on the sublayer axis."""
    rows = frame[(frame["curve"] == curve) & frame[name].notna()]
    return rows.assign(x=x_of(rows))


def _got(checked: Checked, curve: str, name: str) -> Side:
    return Side(_rows(checked.got, curve, name), "new run", GOT)


def _expected(checked: Checked, curve: str, name: str, first: Outcome | None) -> Side | None:
    """The recorded curves, or theory's, or of a mean square that isn't recorded a law's of the new run.

    None where nothing says what to expect.
    """
    if name in checked.expected:
        rows = _rows(checked.expected, curve, name)
        if (first and first.gate == "theory") or not checked.case.recorded:
            return Side(rows, "theory", COLOURS["theory"])
        return Side(rows, "recorded", RECORDED)
    against = first.finding.against if first and first.finding else None
    laws = [law for law in LAWS.values() if law.expected and law.column in checked.got]
    laws.sort(key=lambda law: law.column != against)
    law = next((law for law in laws if checked.got[law.column].notna().any()), None)
    if name != "mean_square" or law is None or curve != "random":
        return None
    rows = checked.got.assign(mean_square=checked.got[law.column])
    return Side(_rows(rows, curve, name), law.label, law.colour)


def _decades(expected: Side | None, got: Side, name: str) -> bool:
    """True if the values ask for a log axis: positive ones, a factor of 10 apart."""
    values = pd.concat([side.rows[name] for side in (expected, got) if side is not None])
    return bool(len(values) and values.min() > 0 and values.max() > 10 * values.min())


def _reach(*sides: Side) -> float:
    """The last place on the axis of sublayers; 1 where there is none."""
    return max((float(side.rows["x"].max()) for side in sides if len(side.rows)), default=0) or 1.0


def _draw(ax: Axes, side: Side, name: str, lw: float, *, dots: bool = True) -> None:
    """Curves' mean over the seeds, and the band from the least to the most; few steps have dots."""
    if side.rows.empty:
        return
    x, y = longest(side.rows)["x"].to_numpy(np.float64), SeedTable(side.rows)[name]
    if len(y) > 1:
        low, high = over_seeds(np.nanmin, y), over_seeds(np.nanmax, y)
        ax.fill_between(x, low, high, color=side.colour, alpha=0.2, lw=0)
    marker = "o" if dots and len(x) <= _DOTS else None
    mean = over_seeds(np.nanmean, y)
    ax.plot(x, mean, color=side.colour, lw=lw, marker=marker, ms=lw + 2, zorder=3)


def _curves(
    ax: Axes, expected: Side | None, got: Side, name: str, *, small: bool = False
) -> None:  # fmt: skip
    """Both sides; the expected one's line is wide, to be seen under the new one."""
    if expected:
        _draw(ax, expected, name, 3.4 if small else 4.5, dots=not small)
    _draw(ax, got, name, 1.3 if small else 1.6, dots=not small)
    sides = [side for side in (expected, got) if side is not None]
    ax.set_xlim(0, _reach(*sides))
    if ax.get_yscale() == "log":
        log_ticks(ax)
    elif name not in SIGNED:
        tops = [float(side.rows[name].max()) for side in sides if len(side.rows)]
        ax.set_ylim(0, 1.12 * max(tops, default=0.0) or 1.0)


def _name(side: Side, name: str) -> tuple[float, str, str, str]:
    """A side's name at its line's end, for ``name_ends``."""
    seeds = side.rows["seed"].nunique()
    end = side.rows[side.rows["x"] == side.rows["x"].max()][name].mean()
    more = f"\n{seeds} seeds, band: least to most" if seeds > 1 else ""
    return float(end), side.label + more, side.colour, "bold"


def _marks(ax: Axes, found: Sequence[Outcome], *, named: bool = False) -> None:
    """Dashed lines where gates find the first difference; ``named`` with names, above the curves."""
    gates: dict[tuple[float, str], list[str]] = {}
    for outcome in found:
        f = outcome.finding
        if f is not None:
            x = x_of(pd.DataFrame({"sublayer": [f.sublayer], "kind": [f.kind]})).iloc[0]
            gates.setdefault((float(x), f.where), []).append(outcome.gate)
    right = ax.get_xlim()[1]
    if named:  # room for two lines of text each
        top = ax.transData.inverted().transform(
            ax.transAxes.transform((0.0, 1 / (1 - _LABEL * len(gates))))
        )
        ax.set_ylim(top=float(top[1]))
    for i, ((x, where), names) in enumerate(sorted(gates.items())):
        ax.axvline(x, color=INK, lw=1.0, ls=(0, (4, 3)), zorder=2)
        if named:
            beyond, fail = x > 0.5 * right, "fails" if len(names) == 1 else "fail"
            ax.annotate(
                f"{', '.join(names)} {fail} first at\n{where}", (x, 0.98 - _LABEL * i),
                (-5 if beyond else 5, 0), xycoords=("data", "axes fraction"), va="top",
                textcoords="offset points", ha="right" if beyond else "left", fontsize=8.5, color=INK,
                bbox=HALO, zorder=6,
            )  # fmt: skip


def _difference(
    figure: Figure, expected: Side, got: Side, name: str, first: Outcome | None,
    found: Sequence[Outcome],
) -> None:  # fmt: skip
    """New over expected − 1 (of what may be negative the difference), where gates see it.

    Of the gate ``exact`` seed by seed, with what rounding may do; else against the expected mean.
    """
    signed, exact = name in SIGNED, first is not None and first.gate == "exact"
    keys = ["seed", "x"] if exact else ["x"]
    base = expected.rows.groupby(keys)[name].mean().rename("base")

    def off(side: Side) -> Side:
        rows = side.rows.join(base, on=keys)
        with np.errstate(divide="ignore", invalid="ignore"):
            values = rows[name] - rows["base"] if signed else rows[name] / rows["base"] - 1
        rows = rows.assign(off=values.where(np.isfinite(values)))
        return Side(rows[rows["off"].notna()], side.label, side.colour)

    title = f"New − {expected.label}" if signed else f"New / {expected.label} − 1"
    under = "against the expected mean; pale: the seeds, least to most"
    limit = first.finding.limit if exact and first and first.finding else 0.0
    if exact:
        under = f"of the same weights; dotted: rounding's share, ± {plain(limit)}"
        if signed:
            limit *= float(np.sqrt((expected.rows[name] ** 2).mean()))
            under = (
                f"of the same weights; dotted: rounding's share, ± {plain(float(f'{limit:.0e}'))}"
            )
    ax = panel(figure, (8.35, 3.15, 4.25, 1.55), title, under)
    if not exact:
        _draw(ax, off(expected), "off", 3.0)
    for end in (-limit, limit) if exact else ():
        ax.axhline(end, color=DIM, lw=1.0, ls=(0, (1, 1.5)), zorder=2)
    ax.axhline(0, color="#b5b5b0", lw=0.8, zorder=1)
    _draw(ax, off(got), "off", 1.6)
    ax.set_xlim(0, _reach(expected, got))
    _marks(ax, found)


def _small(
    figure: Figure, box: tuple[float, float, float, float], checked: Checked, curve: str, name: str,
    first: Outcome | None, found: Sequence[Outcome],
) -> None:  # fmt: skip
    expected, got = _expected(checked, curve, name, first), _got(checked, curve, name)
    title, what = _STREAM[name]
    if expected is None:
        what = "new run; it isn't recorded"
    elif expected.label not in ("recorded", "theory"):
        what = f"wide: {expected.label}"
    ax = panel(figure, box, title, what, log=_decades(expected, got, name))
    _curves(ax, expected, got, name, small=True)
    ax.set_xlabel("sublayer", fontsize=8.5, color=DIM)
    _marks(ax, found)
