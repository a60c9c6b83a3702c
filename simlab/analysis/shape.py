"""The word for a curve's shape, and the goodness of fit that allows it.

A word is given only if its family fits the curve to TOLERANCE of the curve's growth at every point
(and to VALUE_TOLERANCE of each value), so that nobody who looks at the numbers can call it wrong; else
the word is ``none``. Families, simplest first, k the sublayer:

    constant      v varies by less than FLAT of its mean
    linear        v = a + b·k
    exponential   v = a·r^k, fitted to ln v
    power         v = a + b·k^p
    saturating    v = a − b·q^k, with at least REACHED of the way to a behind it, and a clearly better
                  fit than a power, which has no limit
    jump          one step is REACHED of all that v moves, and the rest is flat

Rows that obey another rule are set aside first: those that eps holds back (m/(m + eps) < HELD at the
norm of the branch), and post-norm blocks before others, which keep v at 1. Where norms of
the stream come again and again the word is ``saw-tooth``, and the families describe the stretches
between. Attention and MLP may add different amounts, so points are the blocks' ends where there are at
least LEAST_BLOCKS.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from simlab.analysis.fit import EXPONENTS
from simlab.theory.laws import Array

TOLERANCE = 0.03  # of the range of v: by less a plot shows no difference
VALUE_TOLERANCE = 0.25  # of each value of v, so that a fit's small values are of the right size too
FLAT = 0.02  # of the mean of v
HELD = 0.9  # of m/(m + eps): a row below it is held back
REACHED = 0.8
CLEARLY = 0.5  # of a power's misfit: a fit no better than that doesn't show that there is a limit
LEAST_BLOCKS = 5
LEAST_POINTS = 4  # fewer fit anything
ERRORS = 2.0  # standard errors that chance may move a point by
# Of the range, or of a constant's level: where chance is larger, no word is right.
MOST_CHANCE = 0.08
DROP = 0.05  # of v: a norm of the stream that takes less away makes no saw-tooth
SLACK = 1.5  # on the tolerances of theory's own word
_MOVED = ("constant", "saw-tooth")  # whose tolerance theory's word moves, besides the families'
MOST_POWER = 6.0  # beyond, a power is a name for something else
LEVEL = 0.05  # of the mean of v: within it, a curve without a word has reached a level


@dataclass(frozen=True)
class Fitted:
    """A family's fit to n points: the fitted values (n,), and whether it is one of ln v.

    number: the family's own: exponent p, rate r per sublayer, or the limit of a saturating curve.
    """

    values: Array
    number: float = math.nan
    logs: bool = False


@dataclass(frozen=True)
class Teeth:
    """A saw-tooth. sublayers: between two norms of the stream, None if it isn't the same number.

    low, high: the least and the largest peak; reset: the mean of what norms set v back to. renorm: True
    if re-norms set it back, False if sublayers' own norms do. count: of resets after a peak.
    """

    sublayers: int | None
    low: float
    high: float
    reset: float
    renorm: bool
    count: int


@dataclass(frozen=True)
class GrowthShape:
    """The word for a curve of R rows, and what it rests on.

    misfit: the largest residual at any point, as a share of the curve's range (of ln v's for an
    exponential). start: the first row that the word is about. held: why rows before it are set aside:
    ``eps``, ``norm`` (post-norm blocks), ``reset`` (a norm of the stream sets v there), or None.
    inside: a saw-tooth's word between resets. number: as in ``Fitted``. step: the row of the largest
    step. level: of a curve without a word, the row from which on blocks end within LEVEL of their
    mean, if that is half of them or more.
    """

    word: str
    misfit: float = math.nan
    start: int = 1
    held: str | None = None
    number: float = math.nan
    teeth: Teeth | None = None
    inside: str | None = None
    step: int | None = None
    level: int | None = None


def shape_of(
    v: Array,
    kinds: Sequence[str],
    eps_factor: Array,
    normalises: Sequence[str | None],
    noise: Array | None = None,
    prior: GrowthShape | None = None,
) -> GrowthShape:
    """The shape of a mean curve v (R,).

    Args:
        v: mean square after each row; the embedding's is the first.
        kinds: each row's kind. eps_factor (R,), normalises (R,): as in ``theory.laws.Rows``.
        noise: each row's standard error (R,), by ERRORS of which a point may be off.
        prior: theory's shape of the same curve: its word is kept if it fits v too, so that chance
            doesn't choose between words.
    """
    rows = len(v)
    noise = np.zeros(rows) if noise is None else np.nan_to_num(noise)
    resets = np.array([kind == "renorm" for kind in kinds])
    resets |= np.array([target == "stream" for target in normalises])
    resets[0] = False
    aside = (prior.start, prior.held) if prior else None
    start, held = aside or _set_aside(kinds, eps_factor, normalises, resets)
    if rows - start < LEAST_POINTS or not np.isfinite(v).all():
        return GrowthShape("unknown", start=start, held=held)
    size = float(np.abs(v[start:]).max()) or 1.0
    v, noise = v / size, noise / size
    slack = {name: SLACK if name == prior.word else 1 / SLACK for name in _MOVED} if prior else {}
    drop = 1 + DROP / slack.get("saw-tooth", 1.0)
    drops = [int(i) for i in np.flatnonzero(resets) if i > start and v[i - 1] > drop * v[i]]
    if not drops and resets[start:].any():  # norms of the stream keep it where it is
        start, held = int(np.flatnonzero(resets)[0]), held or "reset"
    after = np.arange(start, rows)
    step = start + 1 + int(np.abs(np.diff(v[start:])).argmax())
    extent, level = float(np.ptp(v[after])), float(np.abs(v[after]).mean())
    chance: Array = ERRORS * noise
    flat = FLAT * slack.get("constant", 1.0) * level
    if prior is None or prior.word == "constant":  # chance doesn't hide a growth that is expected
        flat += min(float(chance[after].max()), MOST_CHANCE * level)
    if extent <= flat:
        return GrowthShape("constant", extent / level if level else 0.0, start, held, step=step)
    if drops:
        shape = _saw_tooth(v, kinds, np.flatnonzero(resets), drops, start, chance)
        teeth = shape.teeth
        assert teeth is not None
        scaled = {name: getattr(teeth, name) * size for name in ("low", "high", "reset")}
        return replace(shape, held=held, step=step, teeth=replace(teeth, **scaled))
    ends = np.array([i for i in range(start, rows) if kinds[i] == "mlp"], int)
    points = ends if len(ends) >= LEAST_BLOCKS else after
    position, whole = (points - start + 1).astype(np.float64), np.zeros(len(points), int)
    theory = prior.word if prior else None
    word, fit, misfit = _word(v[points], position, whole, chance[points], theory)
    if word == "none" and (jump := _jump(v[start:])) is not None:
        return GrowthShape("jump", jump, start, held, step=step)
    if word == "none" or (word == "power" and fit.number > MOST_POWER):
        return GrowthShape("none", start=start, held=held, step=step, level=_level(v, points))
    number = fit.number * size if word == "saturating" else fit.number
    return GrowthShape(word, misfit, start, held, number, step=step)


def _set_aside(
    kinds: Sequence[str], eps_factor: Array, normalises: Sequence[str | None], resets: np.ndarray
) -> tuple[int, str | None]:
    """The first row that a word is about, and why those before it are set aside."""
    rows = len(kinds)
    prefix = 1
    while prefix < rows and resets[prefix] and kinds[prefix] != "renorm":
        prefix += 1
    if 2 < prefix <= rows - LEAST_POINTS and not resets[prefix:].any():
        return prefix, "norm"
    branch = [i for i in range(1, rows) if normalises[i] == "branch" and kinds[i] != "renorm"]
    held = [i for i in branch if eps_factor[i] < HELD]
    # Only a beginning: where eps holds branches back to the end there is no other part to speak of.
    if held and held[-1] + 1 <= rows - LEAST_POINTS and held[-1] < branch[-1] - len(branch) // 3:
        return held[-1] + 1, "eps"
    return 1, None


def _word(
    y: Array, k: Array, segment: np.ndarray, chance: Array, prior: str | None
) -> tuple[str, Fitted, float]:
    """The first family that fits points y (n,) at positions k within segments, theory's word first.

    chance (n,): how far chance may move a point; of it, at most MOST_CHANCE of the range counts.
    """
    chance = np.minimum(chance, MOST_CHANCE * np.ptp(y))
    known = {prior: FAMILIES[prior]} if prior in FAMILIES else {}
    strict = 1.0
    if prior == "none":  # chance doesn't make a word of a curve that deserves none
        chance, strict = np.zeros_like(chance), 1 / SLACK
    for families, slack in ((known, SLACK), *((stage, strict) for stage in STAGES)):
        fits = {word: family(y, k, segment) for word, family in families.items()}
        fitting = [
            (_misfit(y, fit), word, fit)
            for word, fit in fits.items()
            if fit is not None and _fits(y, fit, chance, slack)
        ]
        if fitting:
            misfit, word, fit = min(fitting, key=lambda found: found[0])
            for (
                other
            ) in fitting:  # what has a limit, and what has none, is to be told apart clearly
                if word == "saturating" and other[1] == "power" and misfit > CLEARLY * other[0]:
                    misfit, word, fit = other
            return word, fit, misfit
    return "none", Fitted(y), math.nan


def _misfit(y: Array, fit: Fitted) -> float:
    """The largest residual over the range, of ln y for an exponential."""
    if fit.logs:
        return float(np.abs(np.log(fit.values / y)).max() / np.ptp(np.log(y)))
    return float(np.abs(fit.values - y).max() / np.ptp(y))


def _fits(y: Array, fit: Fitted, chance: Array, slack: float) -> bool:
    """True if every residual is within the tolerances, ``slack`` times, and what chance allows."""
    if fit.logs:
        logs = np.abs(np.log(fit.values / y)) - chance / np.abs(y)
        return bool((logs <= slack * TOLERANCE * np.ptp(np.log(y))).all())
    off = np.abs(fit.values - y) - chance
    return bool(
        (off <= slack * np.minimum(TOLERANCE * np.ptp(y), VALUE_TOLERANCE * np.abs(y))).all()
    )


def _offsets(segment: np.ndarray) -> Array:
    """A column per segment: each has its own a."""
    out: Array = (segment[:, None] == np.unique(segment)).astype(np.float64)
    return out


def _least_squares(y: Array, basis: Array) -> tuple[Array, Array]:
    """Coefficients, and fitted values (n,)."""
    found = np.linalg.lstsq(basis, y, rcond=None)[0].astype(np.float64)
    return found, basis @ found


def _linear(y: Array, k: Array, segment: np.ndarray) -> Fitted | None:
    found, values = _least_squares(y, np.column_stack([_offsets(segment), k]))
    return Fitted(values, float(found[-1]))


def _exponential(y: Array, k: Array, segment: np.ndarray) -> Fitted | None:
    if (y <= 0).any():
        return None
    found, values = _least_squares(np.log(y), np.column_stack([_offsets(segment), k]))
    return Fitted(np.exp(values), math.exp(found[-1]), logs=True)


def _power(y: Array, k: Array, segment: np.ndarray) -> Fitted | None:
    offsets = _offsets(segment)

    def fit(p: float) -> Array:
        return _least_squares(y, np.column_stack([offsets, k**p]))[1]

    return _best(y, fit, EXPONENTS[::8])


def _saturating(y: Array, k: Array, segment: np.ndarray) -> Fitted | None:
    """Of one segment: a is what v tends to."""
    if len(np.unique(segment)) > 1:
        return None
    span = float(k[-1] - k[0])

    def fit(rate: float) -> Array:
        return _least_squares(y, np.column_stack([np.ones(len(k)), np.exp(-rate * (k - k[0]))]))[1]

    # exp(−rate·span) of the way is left at the end: no more than 1 − REACHED.
    best = _best(y, fit, np.geomspace(-math.log(1 - REACHED) / span, 20 / span, 60))
    rate = best.number
    basis = np.column_stack([np.ones(len(k)), np.exp(-rate * (k - k[0]))])
    return replace(best, number=float(_least_squares(y, basis)[0][0]))


def _best(y: Array, fit: Callable[[float], Array], grid: Array) -> Fitted:
    """The fit with the least squared residuals over a grid of the family's number, then a finer one."""

    def number(values: Array) -> int:
        return int(np.argmin([((fit(float(x)) - y) ** 2).sum() for x in values]))

    best = number(grid)
    fine = np.linspace(grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)], 41)
    value = float(fine[number(fine)])
    return Fitted(fit(value), value)


Family = Callable[[Array, Array, np.ndarray], Fitted | None]
# Simplest first; of the two with three numbers the better one is taken.
STAGES: tuple[dict[str, Family], ...] = (
    {"linear": _linear},
    {"exponential": _exponential},
    {"power": _power, "saturating": _saturating},
)
FAMILIES = {word: family for stage in STAGES for word, family in stage.items()}


def _jump(v: Array) -> float | None:
    """The share of all movement outside the largest step, if that step is a jump, else None.

    A jump has rows after it: a last step that is the largest may be the beginning of anything.
    """
    steps = np.abs(np.diff(v))
    if steps.argmax() == len(steps) - 1:
        return None
    rest = 1 - float(steps.max() / steps.sum()) if steps.sum() > 0 else 1.0
    return rest if rest <= 1 - REACHED else None


def _level(v: Array, points: np.ndarray) -> int | None:
    """The first of these rows from which on v is level, in the first half of them, or None."""
    for i, row in enumerate(points[: len(points) // 2 + 1]):
        rest = v[points[i:]]
        if len(rest) >= LEAST_POINTS and np.ptp(rest) <= LEVEL * rest.mean():
            return int(row)
    return None


def _saw_tooth(
    v: Array,
    kinds: Sequence[str],
    resets: np.ndarray,
    drops: Sequence[int],
    start: int,
    chance: Array,
) -> GrowthShape:
    """The teeth, and the word for the stretches between.

    resets: rows where a norm sets v anew; drops: those of them where v falls.
    """
    rows = len(v)
    sublayer = np.cumsum([kind != "renorm" for kind in kinds])  # by row
    lengths = {int(sublayer[b] - sublayer[a]) for a, b in itertools.pairwise(resets)}
    peaks = [float(v[i - 1]) for i in drops]
    teeth = Teeth(
        lengths.pop() if len(lengths) == 1 else None, min(peaks), max(peaks),
        float(v[drops].mean()), kinds[drops[0]] == "renorm", len(drops),
    )  # fmt: skip
    is_reset = np.isin(np.arange(rows), resets)
    position = np.zeros(rows)
    for i in range(start, rows):
        position[i] = 0 if is_reset[i] else position[i - 1] + 1
    inside, fit, misfit = "none", Fitted(v), math.nan
    points = np.arange(start, rows)
    if max(position) >= LEAST_POINTS - 1:
        segment = np.cumsum(is_reset)[start:]
        inside, fit, misfit = _word(v[points], position[points], segment, chance[points], None)
    return GrowthShape("saw-tooth", misfit, start, number=fit.number, teeth=teeth, inside=inside)
