"""How numbers are written, in sentences, tables and figures."""

from __future__ import annotations

import math

import pandas as pd

from simlab.analysis.resampling import Estimate


def short(value: float | None, digits: int = 3) -> str:
    """``digits`` significant digits, ``1.2e5`` far from 1; empty where there is no number.

    Far from 1: below 10^-3, and from 10^(digits + 1) on.
    """
    if value is None or pd.isna(value):
        return ""
    if math.isinf(value):
        return f"{value}"
    if value and not 1e-3 <= abs(value) < 10 ** (digits + 1) - 0.5:
        mantissa, power = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(power)}"
    return f"{value:.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def raised(power: int) -> str:
    """An exponent as it is written: ``⁻¹²``."""
    return str(power).translate(_RAISED)


def off_by(log_error: float) -> str:
    """A log error as a person says it: ``0.8 %``, ``a factor of 5.2``, ``a factor of 10³⁵``."""
    if math.isinf(log_error):
        return "any factor"
    factor, percent = math.exp(min(log_error, 700)), 100 * math.expm1(min(log_error, 700))
    if factor < 2:
        return f"{percent:.2g} %" if percent >= 0.01 else "less than 0.01 %"
    if factor < 1e4:
        return f"a factor of {factor:.2g}" if factor < 99.5 else f"a factor of {factor:.0f}"
    return f"a factor of 10{raised(round(log_error / math.log(10)))}"


def percent(share: float) -> str:
    """A share as ``0.8 %``, ``12 %``; ``less than 0.01 %`` below that."""
    if share < 1e-4:
        return "less than 0.01 %"
    return f"{100 * share:.2g} %" if share < 0.995 else f"{100 * share:.0f} %"


def beside(ratio: float) -> str:
    """How large one value is beside another: ``4× above``, ``2 % below``, ``far above``."""
    if math.isnan(ratio):  # both are 0
        return "no larger than"
    if ratio in (0, math.inf):
        return f"far {'above' if ratio else 'below'}"
    side = "above" if ratio > 1 else "below"
    if 1 / 1.1 < ratio < 1.1:
        return "equal to" if abs(ratio - 1) < 1e-4 else f"{percent(abs(ratio - 1))} {side}"
    return f"{short(max(ratio, 1 / ratio))}× {side}"


def power_of_ten(log10: float) -> str:
    """A number by its decimal logarithm: ``65.2``, ``4·10¹⁹``; three digits from 10^-3 to 10^4."""
    if -3 <= log10 < 4:
        return short(10**log10)
    whole = math.floor(log10)
    digit = round(10 ** (log10 - whole))
    if digit in (1, 10):
        return f"10{raised(whole + (digit == 10))}"
    return f"{digit}·10{raised(whole)}"


def plus_minus(e: Estimate) -> str:
    """``1.00 ± 0.01``, ``(3.1 ± 0.2)·10⁻⁶``: as many decimals as the half-width's first digit."""
    if e.low is None or e.high is None:
        return f"{e.value:.3g}"
    half = (e.high - e.low) / 2
    power = math.floor(math.log10(abs(e.value))) if e.value else 0
    power = 0 if -3 <= power < 4 else power
    value, half = e.value / 10.0**power, half / 10.0**power
    digits = min(6, max(0, -math.floor(math.log10(half)))) if half > 1e-6 else 2
    text = f"{value:.{digits}f} ± {half:.{digits}f}"
    return f"({text})·10{raised(power)}" if power else text


def interval(e: Estimate) -> str:
    """``0.99 … 1.02``; the number alone where there is no interval."""
    return f"{e.value:.2f}" if e.low is None else f"{e.low:.2f} … {e.high:.2f}"


def count(value: float) -> str:
    """Three digits and a unit: ``7.3 B``."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def gigabytes(size: float) -> str:
    """Bytes as ``0.41 GB``, ``3.2 GB``, ``1,200 GB``."""
    return f"{size / 1e9:,.0f} GB" if size >= 1e10 else f"{size / 1e9:.2g} GB"


def duration(seconds: float) -> str:
    """As people say it: ``2.3 s``, ``4 min``, ``1.5 h``; ``unknown`` for NaN."""
    if math.isnan(seconds):
        return "unknown"
    if seconds < 100:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
