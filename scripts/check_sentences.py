"""Verdicts against the numbers they are about: python scripts/check_sentences.py [--configs 520].

Random configs, as many of each placement, are measured by the weightless engine. Of each verdict

- the word for the shape is held against the word that theory's own curve deserves, and
- every claim of the sentence is read from its text and held against the rows of curve.csv, by NumPy
  alone, with nothing of simlab.analysis in between.

The script prints what differs, the rates at the end, and exits with 1 if a claim is false. 520 configs
of 8 seeds take about half an hour of one core.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from theory_error import draw

from simlab.config import ModelConfig
from simlab.theory.mean_field import PredictedRow

NUMBER = r"(\(?-?\d[\d.,]*(?:e-?\d+)?(?: ± [\d.e-]+\)?)?(?:·10[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+)?|10[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+)"
PLAIN = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
WIDTHS = (64, 128, 256, 512)


def number(text: str) -> float:
    """A number as sentences write it: ``1.00 ± 0.01``, ``4·10¹⁹``, ``(3 ± 1)·10⁻⁶``."""
    text = re.sub(r" ± [\d.e-]+", "", text.strip()).strip("(").replace(")", "").rstrip(".,;:")
    head, _, power = text.partition("·10")
    if re.match("10[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]", text):
        head, power = "1", text[2:]
    power = power.translate(PLAIN)
    return float(head) * 10.0 ** int(power or 0)


@dataclass(frozen=True)
class Curve:
    """The seeds' mean curve: one value per row, embedding first."""

    kinds: np.ndarray
    sublayers: np.ndarray
    v: np.ndarray
    columns: pd.DataFrame

    @classmethod
    def of(cls, frame: pd.DataFrame) -> Curve:
        """From the rows of curve.csv, cut to those that all seeds have."""
        frame = frame[frame["curve"] == "random"]
        step = frame.groupby("seed").cumcount()
        length = int(step.groupby(frame["seed"]).max().min()) + 1
        mean = frame.groupby(step).mean(numeric_only=True).iloc[:length]
        first = frame[frame["seed"] == frame["seed"].iloc[0]].iloc[:length]
        return cls(
            first["kind"].to_numpy(), first["sublayer"].to_numpy(),
            mean["mean_square"].to_numpy(), mean.reset_index(drop=True),
        )  # fmt: skip

    def row(self, sublayer: int) -> int:
        """The row after a sublayer, before a re-norm there."""
        return int(np.flatnonzero((self.sublayers == sublayer) & (self.kinds != "renorm"))[0])


def near(text: str, value: float, rtol: float = 0.0) -> bool:
    """True if a number as a sentence has it is the value, to its last digit or to ``rtol``."""
    digits = re.sub(r" ± .*|[^\d].*$", "", text.strip("( ").replace(".", "")).lstrip("0") or "1"
    last = 0.51 * 10.0 ** -(len(digits) - 1) / float(f"{digits[0]}.{digits[1:] or 0}")
    return bool(abs(number(text) - value) <= max(last, rtol) * abs(number(text)))


Check = Callable[[Curve, re.Match[str], int], bool]
CHECKS: list[tuple[str, Check]] = []


def check(pattern: str) -> Callable[[Check], Check]:
    """Register a check of a claim, by the regular expression of its words; ``#``: a number."""

    def register(function: Check) -> Check:
        CHECKS.append((pattern.replace("#", NUMBER), function))
        return function

    return register


def points(curve: Curve, start: int) -> np.ndarray:
    """The rows that a word is about: the blocks' ends from ``start`` on if there are five."""
    ends = np.array([i for i in range(start, len(curve.v)) if curve.kinds[i] == "mlp"])
    return ends if len(ends) >= 5 else np.arange(start, len(curve.v))


def line_error(x: np.ndarray, y: np.ndarray) -> float:
    """The largest residual of a straight line over y's range."""
    return float(np.abs(np.polyval(np.polyfit(x, y, 1), x) - y).max() / np.ptp(y))


@check(r"off by(?: at most)? (a factor of )?(?:less than )?#(?: %)?(?: and| \()")
def theory_error(curve: Curve, found: re.Match[str], start: int) -> bool:
    """The largest factor between the curve and ``law_mean_field``."""
    law = curve.columns["law_mean_field"].to_numpy()
    factor = np.nanmax(np.maximum(curve.v / law, law / curve.v))
    if found[1]:
        return near(found[2], factor, 0.06)
    return abs(number(found[2]) - 100 * (factor - 1)) < 6 * (factor - 1) + 0.011


@check(
    r"ean square (grows|shrinks) by # per (sublayer|block)(?: \(attention adds #, the MLP #\))?, "
    r"linearly \(a line fits to (?:less than )?# %"
)
def linear(curve: Curve, found: re.Match[str], start: int) -> bool:
    """The amount per row from first to last, each kind's own amount, and the line's residual."""
    rows = points(curve, start)
    x = (rows - start).astype(float)
    sign = 1 if found[1] == "grows" else -1
    per_row = (curve.v[-1] - curve.v[start]) / (len(curve.v) - 1 - start)
    per_step = sign * per_row
    if found[3] == "block":
        ends = np.flatnonzero(curve.kinds == "mlp")
        ends = ends[ends >= start]
        per_step = sign * (curve.v[ends[-1]] - curve.v[ends[0]]) / (len(ends) - 1)
    right = near(found[2], per_step, 0.03)
    if found[4]:
        first = int(ends[0])  # whole blocks
        steps, kinds = np.diff(curve.v[first:]), curve.kinds[first + 1 :]
        for group, kind in ((4, "attention"), (5, "mlp")):
            own = steps[kinds == kind].mean()
            right &= near(found[group], own, 0.02)
    misfit = 100 * line_error(x, curve.v[rows])
    return right and misfit < 15 and abs(number(found[6]) - misfit) < 0.06 * misfit + 0.011


@check(r"(grows|shrinks) by a factor # per sublayer, exponentially \(fits to (?:less than )?# %")
def exponential(curve: Curve, found: re.Match[str], start: int) -> bool:
    """The rate by a line through ln v."""
    rows = points(curve, start)
    rate = float(np.exp(np.polyfit(np.arange(start, len(curve.v)), np.log(curve.v[start:]), 1)[0]))
    faster = (rate > 1) == (found[1] == "grows")
    fits = line_error(rows, np.log(curve.v[rows])) < 0.15
    return faster and near(found[2], rate, 0.01) and fits


@check(r"(grows|shrinks) from # to #, (faster|more slowly) than linearly in the sublayer")
def power(curve: Curve, found: re.Match[str], start: int) -> bool:
    """The ends, and to which side the curve bends."""
    rows = points(curve, start)
    y = np.abs(curve.v[rows] - curve.v[rows[0]])
    middle = np.interp((rows[0] + rows[-1]) / 2, rows, y)
    bent = middle < 0.505 * y[-1] if found[4] == "faster" else middle > 0.495 * y[-1]
    ends = near(found[2], curve.v[start]) and near(found[3], curve.v[-1])
    return bool(bent) and ends and (curve.v[-1] > curve.v[start]) == (found[1] == "grows")


@check(r"(grows|shrinks) from # to # and saturates: the fitted curve tends to #")
def saturating(curve: Curve, found: re.Match[str], start: int) -> bool:
    """The second half moves less than half of the first, and the limit is near."""
    rows = points(curve, start)
    y = curve.v[rows]
    half = len(y) // 2
    slower = abs(y[-1] - y[half]) < 0.5 * abs(y[half] - y[0])
    beyond = abs(number(found[4]) - curve.v[-1]) < 0.35 * abs(curve.v[-1] - curve.v[start])
    return bool(slower and beyond) and near(found[3], curve.v[-1])


@check(r"stays at # \(it varies by (?:less than )?# %\)")
def constant(curve: Curve, found: re.Match[str], start: int) -> bool:
    """The level, and the range over the mean."""
    part = curve.v[start:]
    extent = 100 * np.ptp(part) / np.abs(part).mean()
    level = near(found[1], part[-1])
    return level and extent < 10 and abs(number(found[2]) - extent) < 0.06 * extent + 0.011


@check(
    r"is a saw-tooth: a (re-norm|norm of the stream) sets it back to # "
    r"(?:every (?:\d+ blocks, )?(\d+) sublayers|once|again and again), "
    r"from (?:a peak|peaks) of #(?: to #)?"
)
def saw_tooth(curve: Curve, found: re.Match[str], start: int) -> bool:
    """Where v falls by 5 %: to what, from what, how often."""
    v, kinds = curve.v, curve.kinds
    falls = [i for i in range(start + 1, len(v)) if v[i] < v[i - 1] / 1.02]
    if found[1] == "re-norm":
        falls = [i for i in falls if kinds[i] == "renorm"]
    if not falls:
        return False
    peaks = v[np.array(falls) - 1]
    large = peaks[
        peaks > 1.06 * v[falls]
    ]  # of a fall by 2 to 6 % the sentence may or may not speak
    right = near(found[2], v[falls].mean()) and near(found[5] or found[4], peaks.max())
    if found[5]:
        right &= any(near(found[4], peak) for peak in peaks)
        right &= not len(large) or number(found[4]) <= 1.006 * large.min()
    if found[3] and len(falls) > 1:
        right &= not (np.diff(curve.sublayers[falls]) % int(found[3])).any()
    return right


@check(r"moves in one jump, from # to # at sublayer (\d+)")
def jump(curve: Curve, found: re.Match[str], start: int) -> bool:
    """One step is four fifths of all steps."""
    row, steps = curve.row(int(found[3])), np.abs(np.diff(curve.v[start:]))
    ends = near(found[1], curve.v[row - 1]) and near(found[2], curve.v[row])
    return ends and steps.max() >= 0.8 * steps.sum() and int(steps.argmax()) + start + 1 == row


@check(r"goes from # at sublayer \d+ to # in no simple shape")
def no_shape(curve: Curve, found: re.Match[str], start: int) -> bool:
    """No line through v or ln v, nor a constant, fits."""
    rows = points(curve, start)
    y = curve.v[rows]
    line = np.polyval(np.polyfit(rows, y, 1), rows)
    no_line = line_error(rows, y) > 0.019 or np.abs(line / y - 1).max() > 0.16
    no_rate = (y <= 0).any() or line_error(rows, np.log(y)) > 0.019 or np.ptp(np.log(y)) < 0.5
    flat = np.ptp(curve.v[start:]) < 0.015 * y.mean()
    ends = near(found[1], curve.v[start]) and near(found[2], curve.v[-1])
    return bool(no_line and no_rate and not flat) and ends


@check(r"; from sublayer (\d+) on blocks end (?:between # and|at) #")
def level(curve: Curve, found: re.Match[str], start: int) -> bool:
    """The least and the largest of the blocks' ends from there on, half of them or more."""
    every = np.flatnonzero(curve.kinds == "mlp")
    ends = every[every >= curve.row(int(found[1]))]
    y = curve.v[ends]
    right = near(found[2] or found[3], y.min()) and near(found[3], y.max())
    return right and y.max() < 1.06 * y.min() and len(ends) >= len(every[every >= start]) // 2


@check(r"from sublayer (\d+) on \(before, eps holds")
def eps(curve: Curve, found: re.Match[str], start: int) -> bool:
    """m/(m + eps) passes 0.9 there, for good."""
    c = curve.columns["eps_factor"].to_numpy()
    return c[start - 1] < 0.9 and bool((c[start:] >= 0.9).all())


@check(r"the additive law (?:holds to|is not decided, off by|fails, off by) (?:less than )?# %")
def additive(curve: Curve, found: re.Match[str], start: int) -> bool:
    """The largest departure from ``law_additive``."""
    law = curve.columns["law_additive"].to_numpy()[1:]
    if np.isnan(law).all():
        return False
    error = np.nanmax(np.abs(np.log(law / curve.v[1:])))
    return abs(number(found[1]) - 100 * np.expm1(error)) < 6 * np.expm1(error) + 0.011


@check(
    r"From the (embedding|last re-norm)'s #, √2 per sublayer would have meant # after (\d+) blocks?, "
    r"and “2·√2 per layer” #; it is #"
)
def sqrt2(curve: Curve, found: re.Match[str], start: int) -> bool:
    """v·4^blocks and v·8^blocks from the value that is said: the start's or the last re-norm's."""
    block_ends = np.flatnonzero(curve.kinds == "mlp")
    row = int(block_ends[int(found[4]) - 1])
    renorms = [i for i in range(row) if curve.kinds[i] == "renorm"]
    since = renorms[-1] if renorms else 0
    blocks = int((curve.kinds[since : row + 1] == "mlp").sum())
    said = [np.log10(curve.v[since]) + blocks * np.log10(base) for base in (4, 8)]
    pairs = zip((3, 5), said, strict=True)
    right = [abs(np.log10(number(found[i])) - log) < 0.18 for i, log in pairs]  # one digit
    start = (found[1] == "embedding") == (since == 0) and near(found[2], curve.v[since])
    return all(right) and start and near(found[6], curve.v[row])


@check(
    r"gradient's rms (falls|rises) #-fold through the model \(# at the embedding, # at the end\)"
)
def gradient(curve: Curve, found: re.Match[str], start: int) -> bool:
    """The ratio of both ends."""
    g = curve.columns.get("gradient_rms", pd.Series(np.nan, curve.columns.index)).to_numpy()
    ratio = g[0] / g[-1] if found[1] == "falls" else g[-1] / g[0]
    ends = near(found[3], g[0]) and near(found[4], g[-1])
    return ends and near(found[2], ratio)


def false_claims(sentence: str, frame: pd.DataFrame) -> Iterator[str]:
    """The claims of a verdict that the rows of curve.csv don't bear out, and a verdict without any."""
    curve, start = Curve.of(frame), 1
    if found := re.search(r"from sublayer (\d+) on(?: \(before|, where)", sentence):
        start = curve.row(int(found[1]))
    elif found := re.search(r"after sublayer (\d+) \(until there norms", sentence):
        start = curve.row(int(found[1])) + 1
    count = 0
    for pattern, right in CHECKS:
        if found := re.search(pattern, sentence):
            count += 1
            if not right(curve, found, start):
                yield found[0]
    if count < 2 and "too few rows" not in sentence and "no sublayer" not in sentence:
        yield f"only {count} claims were understood"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, judge, check."""
    from simlab import compose
    from simlab.analysis.shape import shape_of
    from simlab.experiment import prepare, run
    from simlab.schemes.placement import PLACEMENTS
    from simlab.theory.mean_field import predict

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--configs", type=int, default=520)
    parser.add_argument("--first", type=int, default=0, help="seed of the first config's draw")
    parser.add_argument("--seeds", type=int, default=8)
    args = parser.parse_args(argv)
    placements, same, known, false = list(PLACEMENTS), 0, 0, 0
    for i in range(args.first, args.first + args.configs):
        overrides = draw(np.random.default_rng(i), WIDTHS, 32)
        overrides += [
            f"norm={placements[i % len(placements)]}", f"seeds={args.seeds}", "engine=weightless",
            f"gradients={'true' if i % 5 == 0 else 'false'}",
        ]  # fmt: skip
        overrides = [o for o in overrides[:-4] if not o.startswith("norm=")] + overrides[-4:]
        config = compose(overrides)
        result = run(config)
        if "random" not in result.verdicts:  # every curve overflowed at the embedding
            continue
        verdict = result.verdicts["random"]
        theory = predict(config.shape, config.init, prepare(config).tokens)
        if theory.ends is None:
            known += 1
            kinds = [row.kind for row in theory.rows]
            v, c = (theory.column(n, len(kinds)) for n in ("mean_square", "eps_factor"))
            deserved = shape_of(v, kinds, c, normalises_of(config.shape, theory.rows)).word
            same += deserved == verdict.shape.word
            if deserved != verdict.shape.word:
                print(
                    f"{i}: {verdict.shape.word}, theory's curve {deserved}: {' '.join(overrides)}"
                )
        for claim in false_claims(verdict.sentence, result.curve):
            false += 1
            print(
                f"{i}: FALSE: {claim}\n    {verdict.sentence}\n    {' '.join(overrides)}",
                flush=True,
            )
        if (i + 1) % 20 == 0:
            print(f"{i + 1}: same word {same} of {known}, {false} false claims", flush=True)
    share = f"{same} of {known} ({same / max(known, 1):.1%})"
    print(f"word as theory's own curve: {share}; false claims: {false}")
    return int(false > 0)


def normalises_of(model: ModelConfig, rows: Sequence[PredictedRow]) -> list[str | None]:
    """What each predicted row's last norm acts on, as the scheme says it."""
    from simlab.schemes.placement import at

    return [
        None if row.block is None else "stream" if row.kind == "renorm"
        else at(model, row.block, row.kind).normalises for row in rows
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
