"""The decision on a law, made here once, in three words that tables, pages and sentences share.

``holds``, ``off`` (beyond chance) or ``not decided`` (chance may explain how far the law is off). How
far is one number, too, the factor by which law and curve differ: max(r, 1/r) − 1, r their ratio, in the
row where that is largest (``numbers.off_by`` of its logarithm). So 6 % too low is 6.4 % off.
"""

from __future__ import annotations

import math

from simlab.analysis.agreement import MATTERS
from simlab.analysis.resampling import MIN_SEEDS

HOLDS, OFF, UNDECIDED = "holds", "off", "not decided"
UNTOLD = f"so few seeds can't tell from chance ({MIN_SEEDS} needed)"
NOT_DECIDED = (
    f"chance may explain it; fewer than {MIN_SEEDS} seeds tell a factor of 2 or more only."
)


def decision(curve: str, status: str, log_error: float | None) -> str | None:
    """HOLDS, OFF or UNDECIDED; None where the law says nothing of the curve.

    curve: random, theory or checkpoint. Chance is in random inits alone: of others the size decides.
    status, log_error: as ``verdict.Fit``, summary.json and jobs.csv have them; NaN, None: no number.
    """
    known = log_error is not None and not math.isnan(log_error)
    if status == "unknown" and not known:
        return None
    if curve != "random" and log_error is not None and known:
        return HOLDS if log_error <= math.log1p(MATTERS) else OFF
    return {"holds": HOLDS, "fails": OFF}.get(status, UNDECIDED)
