"""Laws: closed forms for the residual stream's mean square v after every sublayer.

A curve has R rows: the embedding, then a row per sublayer, with rows of kind ``renorm`` between.
Laws predict ln v, natural logs, because √2 per sublayer leaves float64 at depth 500.

``LAWS`` is the registry. Tables, figures, verdicts, columns and the gate ``law`` go through it, so a
new law is one function and one entry.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Rows:
    """The input of a law, for S curves with R rows: their start and their norms, no growth.

    kinds (R): embedding, attention, mlp, renorm, or a probe's own word. first (S,): the embedding's
    mean square. eps_factor (S, R): m/(m + eps), m the mean square that the step's last norm divides by.
    gain (R): that norm's. normalises (R): what it acts on, ``branch``, ``stream``, ``skip``, or None
    where the branch is added as it comes; placements may differ from row to row. mean_field (R): ln v
    of the mean-field recursion, NaN beyond its end; None where there is no prediction.
    """

    kinds: Sequence[str]
    first: Array
    eps_factor: Array
    gain: Sequence[float]
    normalises: Sequence[str | None]
    mean_field: Array | None = None


def sqrt2(rows: Rows) -> Array:
    """rms × √2 per sublayer, taken literally: v_k = v_0 · 2^k; 1 after a re-norm. (S, R), ln v.

    Said in allenai/OLMo issue 797 ("growth by sqrt(2) per MLP/attn").
    """
    with np.errstate(divide="ignore"):  # an embedding of zeros
        log = [np.log(rows.first)]
    for row, kind in enumerate(rows.kinds[1:], start=1):
        reset = kind == "renorm"
        log.append(np.log(rows.eps_factor[:, row]) if reset else log[-1] + np.log(2))
    return np.stack(log, axis=1)


def additive(rows: Rows) -> Array:
    """v_k = v_0 + Σ_j g_j²·c_j, with c_j = m_j/(m_j + eps): each sublayer adds its normed branch.

    A branch normed to gain g has mean square g²c, and E⟨x, branch⟩ = 0 because the sublayer's last
    matrix is fresh, independent of x and isotropic: exact in expectation at every width for
    ``reordered`` and ``peri``. A norm of the stream sets v anew, v_k = g_k²c_k: a re-norm, and every
    step of ``post`` and ``deepnorm``. A step that norms neither has no such law (``normed``).
    (S, R), ln v. Derived in docs/laws.md; tested by simulation.
    """
    v = [rows.first]
    for row in range(1, len(rows.kinds)):
        added = rows.gain[row] ** 2 * rows.eps_factor[:, row]
        v.append(added if rows.normalises[row] == "stream" else v[-1] + added)
    with np.errstate(divide="ignore"):  # a gain of 0 under post: v = 0
        return np.log(np.stack(v, axis=1))


def normed(rows: Rows) -> bool:
    """True if every step norms its branch or the stream, so that the additive law is one for it."""
    return {*rows.normalises[1:]} <= {"branch", "stream"}


def added(rows: Rows) -> bool:
    """True if every row adds one sublayer to the stream, and no sublayer's own norm acts on it.

    Rows of a whole block, and of attention and MLP in parallel, are several sublayers at once.
    """
    steps = zip(rows.kinds, rows.normalises, strict=True)
    return not {"block", "parallel"} & {*rows.kinds} and all(
        target not in ("stream", "skip") or kind == "renorm" for kind, target in steps
    )


def mean_field(rows: Rows) -> Array:
    """The mean-field recursion's v (``theory.mean_field``), the same for all curves. (S, R), ln v."""
    assert rows.mean_field is not None
    return np.tile(rows.mean_field, (len(rows.first), 1))


def has_prediction(rows: Rows) -> bool:
    """True if the recursion predicts the rows after the embedding, or some of them."""
    return rows.mean_field is not None and bool(np.isfinite(rows.mean_field[1:]).any())


@dataclass(frozen=True)
class Law:
    """One law: what it predicts, and how tables, sentences and figures show it.

    name: of keys and columns; ``law_NAME`` in curve.csv, ``NAME`` in summary.json and jobs.csv.
    predict: ln v (S, R) of the curves' rows. head: of a table's column. label: in a figure's legend.
    phrase: the subject of a sentence. colour, line: of its curve in figures, as matplotlib takes them.
    expected: True if random inits are expected to obey it. A sweep's table and λ figures show such a
    law, and linear axes make room for it. exact: True if it holds exactly in expectation, so that a
    test may reject it for any difference beyond chance; the gate ``law`` tests the exact expected ones.
    applies: False for curves whose placement makes it no law; it is then neither claimed nor drawn.
    """

    name: str
    predict: Callable[[Rows], Array]
    head: str
    label: str
    phrase: str
    colour: str
    line: tuple[float, tuple[float, ...]]
    expected: bool = False
    exact: bool = True
    applies: Callable[[Rows], bool] = lambda rows: True

    def log_of(self, rows: Rows) -> Array:
        """Ln v (S, R) of the curves' rows; NaN where the law doesn't apply."""
        if self.applies(rows):
            return self.predict(rows)
        return np.full((len(rows.first), len(rows.kinds)), np.nan)

    @property
    def column(self) -> str:
        """Its column in curve.csv: the mean square that it predicts."""
        return f"law_{self.name}"


# Where they coincide, the additive law's dots lie in the gaps between theory's dashes.
LAWS: dict[str, Law] = {
    law.name: law
    for law in (
        Law(
            "additive", additive, "additive", "additive law", "the additive law",
            "#222222", (2.7, (1.4, 6.6)), expected=True, applies=normed,
        ),
        Law(
            "sqrt2", sqrt2, "√2 law", "√2 per sublayer", "√2 per sublayer",
            "#E69F00", (0, (5, 2)), applies=added,
        ),
        Law(
            "mean_field", mean_field, "theory", "theory (mean field)", "theory",
            "#009E73", (0, (4, 4)), expected=True, exact=False, applies=has_prediction,
        ),
    )
}  # fmt: skip
