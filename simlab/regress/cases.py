"""Recorded growth curves: a case (NAME.yaml, written by hand) and its curves (NAME.csv).

    # NAME.yaml
    description: what it stands for
    overrides: [model=olmo2_7b, norm=reordered, seeds=10, device=cpu]   # as simlab.run takes them
    gates: [exact, statistical, law]
    quantities: [norm, cosine]                                          # optional

The CSV has a few ``# key: value`` lines, then a row per curve × seed × step. A case whose only gate is
``theory`` has none.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from simlab.checkpoints.untrusted.yaml import read_mapping
from simlab.config import ConfigError, nearest, printable
from simlab.config.fields import Fields
from simlab.regress.gates import QUANTITIES, ROW_KEYS, STEP, Outcome
from simlab.store import write_atomically, write_text

GATES = ("exact", "statistical", "law", "theory")
_RECORDED_DIGITS = 7  # of a recorded number: float32 has no more


@dataclass(frozen=True)
class Case:
    """A case: the run that it records, and the gates that compare it."""

    name: str
    folder: Path
    description: str
    overrides: tuple[str, ...]
    gates: tuple[str, ...]
    quantities: tuple[str, ...] = QUANTITIES

    @property
    def command(self) -> str:
        """The overrides in one line, as the record has them."""
        return " ".join(" ".join(self.overrides).split())

    @property
    def recorded(self) -> bool:
        """True if a gate compares with recorded curves, or with as many seeds as they have."""
        return self.gates != ("theory",)

    @property
    def curves(self) -> Path:
        """The recorded curves' file."""
        return self.folder / f"{self.name}.csv"


@dataclass(frozen=True)
class Baseline:
    """Recorded curves, and facts about them: reason, overrides, engine, device, dtype, versions."""

    frame: pd.DataFrame
    about: Mapping[str, str]


@dataclass(frozen=True)
class Checked:
    """A case that was run: the gates' outcomes, the recorded (or predicted) curves and the new ones."""

    case: Case
    outcomes: Sequence[Outcome]
    expected: pd.DataFrame
    got: pd.DataFrame
    seconds: float

    @property
    def passed(self) -> bool:
        """True if every gate passes."""
        return all(outcome.passed for outcome in self.outcomes)


def read_cases(folder: Path) -> list[Case]:
    """Every case of a folder, by name. Raises ConfigError."""
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; --baselines names the one with the cases")
    paths = sorted(folder.glob("*.yaml"))
    if not paths:
        raise ConfigError(f"{folder}: has no case, a file NAME.yaml")
    return [read_case(path) for path in paths]


def read_case(path: Path) -> Case:
    """One case. Raises ConfigError, naming the file and the key."""
    values = read_mapping(path)
    if not re.fullmatch(r"[\w.-]+", path.stem):
        raise ConfigError(f"{path}: a case's name may have letters, digits, _, - and .")
    fields = Fields(values, f"{path}: ")
    fields.only("a case", ("description", "overrides", "gates", "quantities"))
    quantities = _texts(fields, "quantities") if "quantities" in values else QUANTITIES
    gates = _texts(fields, "gates")
    for gate in gates:
        if gate not in GATES:
            allowed = f"allowed: {', '.join(GATES)}{nearest(gate, GATES)}"
            raise fields.fail("gates", gate, allowed)
    return Case(
        path.stem, path.parent, fields.text("description") or "", _texts(fields, "overrides"),
        gates, quantities,
    )  # fmt: skip


def _texts(fields: Fields, key: str) -> tuple[str, ...]:
    value = fields.take(key)
    if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
        raise fields.fail(key, value, "allowed: a list of texts")
    if len(set(value)) != len(value):
        raise fields.fail(key, value, "something is in it twice")
    return tuple(value)


def write_baseline(
    path: Path, frame: pd.DataFrame, quantities: Sequence[str], about: Mapping[str, Any]
) -> None:
    """Record curves, atomically: the same curves, the same bytes. Raises ConfigError, OSError."""
    measured = [str(c) for c in frame.columns if c not in ROW_KEYS]
    missing = [q for q in quantities if q not in measured]
    if missing:
        hint = nearest(missing[0], measured)
        raise ConfigError(f"quantities={missing[0]}: isn't measured{hint}; {', '.join(measured)}")
    rows = frame[[*ROW_KEYS, *quantities]].copy()
    rows["block"] = rows["block"].astype("Int64")
    text = io.StringIO()
    for key, value in about.items():
        text.write(f"# {key}: {printable(' '.join(str(value).split()))}\n")
    rows.to_csv(text, index=False, float_format=f"%.{_RECORDED_DIGITS}g", lineterminator="\n")
    write_atomically(path, lambda aside: write_text(aside, text.getvalue()))


def refuse_not_finite(rows: pd.DataFrame, quantities: Sequence[str], path: Path) -> None:
    """Raise ConfigError for curves that aren't to be recorded: nothing can be held against NaN.

    A quantity may be NaN where there is none (a branch of the embedding), and not everywhere.
    """
    measured = [q for q in quantities if q in rows]  # another is write_baseline's to refuse
    values = rows[measured].to_numpy(np.float64)
    # These are known at every step.
    states = np.isin(measured, ["norm", "mean_square", "mean", "mean_abs", "max_abs"])
    bad = np.isinf(values).any(1) | np.isnan(values[:, states]).any(1)
    if bad.any():
        row = rows[bad].iloc[0]
        why = f"{row['curve']} {row['seed']} isn't finite from sublayer {row['sublayer']} on"
    elif rows.empty or (measured and np.isnan(values).all()):
        why = "they have no numbers"
    else:
        return
    raise ConfigError(f"{path}: not recorded, {why}; only finite curves are")


def read_baseline(path: Path, quantities: Sequence[str]) -> Baseline:
    """Recorded curves with these quantities. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: not recorded yet") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text") from error
    about = {}
    lines = text.splitlines()
    while lines and lines[0].startswith("#"):
        key, _, value = lines.pop(0).removeprefix("#").partition(":")
        about[key.strip()] = value.strip()
    try:
        frame = pd.read_csv(io.StringIO("\n".join(lines)))
        frame = frame.astype(dict.fromkeys(quantities, np.float64))
        frame = frame.astype({"seed": np.int64, "sublayer": np.int64, "block": "Int64"})
        frame = frame[[*ROW_KEYS, *quantities]]
        steps = {
            (name, tuple(rows[STEP].itertuples(index=False, name=None)))
            for (name, _), rows in frame.groupby(["curve", "seed"], sort=False)
        }
        if np.isinf(frame[list(quantities)].to_numpy()).any():
            raise ValueError("an infinite number")
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        what = str(error).splitlines()[0]
        raise ConfigError(f"{path}: not recorded curves of these quantities ({what})") from error
    if not steps or len(steps) != frame["curve"].nunique():
        raise ConfigError(f"{path}: its curves don't have the same steps")
    return Baseline(frame, about)
