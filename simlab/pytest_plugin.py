"""The pytest fixture ``growth_regression``: a model's growth curve, held by its own test suite.

    def test_growth(growth_regression):
        torch.manual_seed(0)
        growth_regression.check(MyModel(), torch.arange(64)[None])

As with pytest-regressions: the first run records TEST_FILE/TEST_NAME.csv beside the test's file and
fails, so that it is looked at and committed; later runs compare; ``--growth-update`` records anew.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

    from simlab.growth.gates import Outcome
    from simlab.layout import Layout

GATES = ("exact", "statistical")


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
    folder = request.path.parent / request.path.stem
    return GrowthRegression(folder, re.sub(r"\W", "_", request.node.name), tmp_path, update)


class GrowthRegression:
    """What the fixture gives. A curve's file is FOLDER/NAME.csv; ``basename`` is another NAME."""

    def __init__(self, folder: Path, name: str, tmp_path: Path, update: bool) -> None:
        self.folder, self.name, self.tmp_path, self.update = folder, name, tmp_path, update

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
        import simlab

        dtype = str(next(p.dtype for p in model.parameters() if p.is_floating_point()))
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
        from simlab.baseline import Case, read_baseline, write_baseline
        from simlab.config import ConfigError
        from simlab.growth.gates import QUANTITIES, RTOL

        if gate not in GATES:
            raise ConfigError(f"gate={gate}: allowed: {', '.join(GATES)}")
        if dtype not in RTOL:
            raise ConfigError(f"dtype={dtype}: allowed: {', '.join(RTOL)}")
        kept = tuple(quantities or QUANTITIES)
        case = Case(basename or self.name, self.folder, "", (), (gate,), kept)
        if gate == "statistical":
            _refuse_few(rows)
        if self.update or not case.curves.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_baseline(case.curves, rows, kept, {"case": case.name, "dtype": dtype})
            again = "anew" if self.update else "for the first time"
            pytest.fail(
                f"growth curve recorded {again}, look at it and commit it: {case.curves}",
                pytrace=False,
            )
        recorded = read_baseline(case.curves, kept)
        outcome = _judge(gate, recorded.frame, rows, kept, dtype)
        if not outcome.passed:
            pytest.fail(self._message(case, outcome, recorded.frame, rows), pytrace=False)

    def _message(
        self, case: Any, outcome: Outcome, expected: pd.DataFrame, got: pd.DataFrame
    ) -> str:
        """What is wrong, and where the figure and the new curve are."""
        from simlab.baseline import Checked, write_baseline
        from simlab.report.regressed import draw

        obtained = self.tmp_path / f"{case.name}.obtained.csv"
        write_baseline(obtained, got, case.quantities, {"case": case.name})
        (figure,) = draw([Checked(case, [outcome], expected, got, 0.0)], self.tmp_path, every=True)
        return (
            f"growth curve is not as recorded ({outcome.gate} {outcome.short}): {outcome.why}\n"
            f"expected: {case.curves}\nobtained: {obtained}\nfigure:   {figure}\n"
            "if it is meant to be so: pytest --growth-update"
        )


def _judge(
    gate: str, old: pd.DataFrame, new: pd.DataFrame, quantities: Sequence[str], dtype: str
) -> Outcome:
    from simlab.growth.gates import exact, statistical

    judge = exact if gate == "exact" else statistical
    return judge(old, new, quantities, dtype)


def _refuse_few(rows: pd.DataFrame) -> None:
    """Raise ConfigError where there are too few curves for the statistical gate, or two kinds."""
    from simlab.config import ConfigError
    from simlab.growth.gates import ALPHA
    from simlab.growth.permutation import enough

    count = rows["seed"].nunique()
    least = next(n for n in range(2, 1000) if enough(n, n, ALPHA))
    if rows["curve"].nunique() > 1 or count < least:
        raise ConfigError(
            f"gate=statistical: {count} seeds of {rows['curve'].nunique()} curves: needs one curve"
            f" of at least {least} seeds"
        )
