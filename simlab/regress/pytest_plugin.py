"""The pytest fixture ``growth_regression``: a model's growth curve, held by its own test suite.

    def test_growth(growth_regression):
        torch.manual_seed(0)
        growth_regression.check(MyModel(), torch.arange(64)[None])

As with pytest-regressions: the first run records TEST_FILE/TEST_NAME.csv beside the test's file and
fails, so that it is looked at and committed; later runs compare; ``--growth-update`` records anew.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

    from simlab.measurement.layout import Layout
    from simlab.regress.gates import Outcome

_LONGEST = 200  # bytes of a recorded file's name without its ending; file systems take 255
_FIXTURE_GATES = ("exact", "statistical")
USED = pytest.StashKey[dict[Path, str]]()  # recorded files of a session, and which test's they are


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--growth-update``."""
    parser.getgroup("simlab").addoption(
        "--growth-update", action="store_true", help="record the curves of growth_regression anew"
    )


@pytest.fixture
def growth_regression(request: pytest.FixtureRequest, tmp_path: Path) -> GrowthRegression:
    """Holds a model's growth curve against the one recorded beside the test."""
    update = bool(request.config.getoption("--growth-update"))
    update |= bool(request.config.getoption("force_regen", False))  # pytest-regressions'
    name = ".".join(filter(None, [request.cls and request.cls.__name__, request.node.name]))
    used = request.config.stash.setdefault(USED, {})
    folder = request.path.parent / request.path.stem
    plain = re.sub(r"[^\w.]", "_", name)
    if len(plain.encode()) > _LONGEST:  # parametrised with a long text, say
        short = plain.encode()[: _LONGEST - 10].decode(errors="ignore")
        plain = f"{short}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return GrowthRegression(folder, plain, tmp_path, update, used, request.node.nodeid)


class GrowthRegression:
    """The fixture's value. A curve's file is FOLDER/NAME.csv; ``basename`` replaces NAME."""

    def __init__(
        self,
        folder: Path,
        name: str,
        tmp_path: Path,
        update: bool,
        used: dict[Path, str],
        test: str,
    ) -> None:
        self.folder, self.name, self.tmp_path, self.update = folder, name, tmp_path, update
        self.used, self.test, self.here = used, test, set[Path]()

    def check(
        self,
        model: nn.Module,
        batch: Any,
        *,
        layout: Layout | None = None,
        quantities: Sequence[str] | None = None,
        basename: str | None = None,
    ) -> None:
        """The curve of one model on one batch (as ``simlab.probe`` takes them), by the exact gate."""
        import torch

        import simlab

        own = (p.dtype for p in model.parameters() if p.is_floating_point())
        dtype = str(next(own, torch.get_default_dtype()))  # of a model without parameters
        with _one_line():
            rows = simlab.probe(model, batch, layout=layout).rows()
        self.check_rows(
            rows, dtype=dtype.removeprefix("torch."), quantities=quantities, basename=basename
        )

    def check_rows(
        self,
        rows: pd.DataFrame,
        gate: str = "exact",
        *,
        dtype: str = "float32",
        quantities: Sequence[str] | None = None,
        basename: str | None = None,
    ) -> None:
        """Rows that ``simlab.probe`` gave, of several seeds where ``gate`` is statistical.

        exact: the same numbers. statistical: other random inits of the same law; at least 7 of them
        on either side, each with its own ``seed``. dtype: the one that the model computes in, which
        says what rounding may do.
        """
        from simlab.config import ConfigError
        from simlab.regress.cases import (
            Case,
            read_baseline,
            refuse_not_finite,
            write_baseline,
        )
        from simlab.regress.gates import QUANTITIES, RTOL, exact, statistical

        with _one_line():
            if gate not in _FIXTURE_GATES:
                raise ConfigError(f"gate={gate}: allowed: {', '.join(_FIXTURE_GATES)}")
            if dtype not in RTOL:
                raise ConfigError(f"dtype={dtype}: allowed: {', '.join(RTOL)}")
            if isinstance(quantities, str):
                raise ConfigError(f"quantities={quantities!r}: allowed: a list of columns")
            compared = tuple(quantities or QUANTITIES)
            case = Case(self._name(basename), self.folder, "", (), (gate,), compared)
            _refuse_cut(rows)
            if gate == "statistical":
                _refuse_few(rows, "these")
            if self.update or not case.curves.exists():
                refuse_not_finite(rows, compared, case.curves)
                self.folder.mkdir(parents=True, exist_ok=True)
                write_baseline(case.curves, rows, compared, {"case": case.name, "dtype": dtype})
                again = "anew" if self.update else "for the first time"
                pytest.fail(
                    f"growth curve recorded {again}, look at it and commit it: {case.curves}",
                    pytrace=False,
                )
            recorded = read_baseline(case.curves, compared)
            if recorded.about.get("dtype") != dtype:
                was = recorded.about.get("dtype")
                raise ConfigError(f"dtype={dtype}: {case.curves} was recorded with {was}")
            if gate == "statistical":
                _refuse_few(recorded.frame, "the recorded")
            judge = exact if gate == "exact" else statistical
            outcome = judge(recorded.frame, rows, compared, dtype)
            said = "" if outcome.passed else self._message(case, outcome, recorded.frame, rows)
        if said:
            pytest.fail(said, pytrace=False)

    def _name(self, basename: str | None) -> str:
        """The file's name, which no other check has. Raises ConfigError."""
        from simlab.config import ConfigError

        name = basename or self.name
        if not re.fullmatch(r"[\w.-]+", name) or len(name.encode()) > _LONGEST:
            allowed = f"letters, digits, _, - and ., at most {_LONGEST} bytes"
            raise ConfigError(f"basename={name[:60]}: allowed: {allowed}")
        path = self.folder / f"{name}.csv"
        if self.used.setdefault(path, self.test) != self.test or path in self.here:
            raise ConfigError(f"{path} is the curve of another check: give this one a basename")
        self.here.add(path)
        return name

    def _message(
        self, case: Any, outcome: Outcome, expected: pd.DataFrame, got: pd.DataFrame
    ) -> str:
        """The failure's message, with the paths of the figure and of the new curve."""
        from simlab.regress.cases import Checked, write_baseline
        from simlab.regress.report import draw_cases

        obtained = self.tmp_path / f"{case.name}.obtained.csv"
        write_baseline(obtained, got, case.quantities, {"case": case.name})
        (figure,) = draw_cases(
            [Checked(case, [outcome], expected, got, 0.0)], self.tmp_path, every=True
        )
        return (
            f"growth curve is not as recorded ({outcome.gate} {outcome.short}): {outcome.why}\n"
            f"expected: {case.curves}\nobtained: {obtained}\nfigure:   {figure}\n"
            "if it is meant to be so: pytest --growth-update"
        )


@contextmanager
def _one_line() -> Iterator[None]:
    """Turn a ConfigError into a test failure of one line, without the error as its context."""
    from simlab.config import ConfigError

    try:
        yield
    except ConfigError as error:
        raise pytest.fail.Exception(f"growth_regression: {error}", pytrace=False) from None


def _refuse_cut(rows: pd.DataFrame) -> None:
    """Raise ConfigError for rows of a curve that was cut where it isn't finite: the rest looks well."""
    from simlab.config import ConfigError
    from simlab.measurement.model_probe import NOT_FINITE_FROM

    start = rows.attrs.get(NOT_FINITE_FROM)
    ends = rows.groupby(["curve", "seed"])["sublayer"].max()
    short = ends[ends < ends.groupby("curve").transform("max")]
    if (
        start is None and not short.empty
    ):  # some seeds are whole: their attrs differ, and are dropped
        start = short.min() + 1
    if start is not None:
        raise ConfigError(
            f"the curve isn't finite from sublayer {start} on: such a model is neither recorded nor "
            "as recorded"
        )


def _refuse_few(rows: pd.DataFrame, which: str) -> None:
    """Raise ConfigError if the statistical gate needs more seeds, or if curves are of two kinds."""
    from simlab.analysis.resampling import enough
    from simlab.config import ConfigError
    from simlab.regress.gates import GATE_ALPHA

    count, kinds = rows["seed"].nunique(), rows["curve"].nunique()
    least = next(n for n in range(2, 1000) if enough(n, n, GATE_ALPHA))
    if kinds > 1 or count < least:
        raise ConfigError(
            f"gate=statistical: {which} rows have {count} seeds of {kinds} curves: needs one curve of"
            f" at least {least} seeds"
        )
