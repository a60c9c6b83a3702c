"""``python -m simlab.regress``: do growth curves still look as recorded? Exit status 0, 1 or 2.

A case is a file NAME.yaml beside its recorded curves NAME.csv (``regress.cases``); its gates
(``regress.gates``) compare a new run with these, or with what theory predicts. Only
``--update NAME --reason "…"`` records.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from simlab.regress import before_imports

if __name__ == "__main__":
    before_imports()

from simlab import __version__, signals
from simlab.analysis.resampling import enough
from simlab.budget.process import tune_process
from simlab.config import ConfigError, RunConfig, nearest
from simlab.config.cli_errors import MISTAKES, explain, in_one_line
from simlab.config.validate import compose
from simlab.regress.blame import norms_of
from simlab.regress.cases import (
    Baseline,
    Case,
    Checked,
    read_baseline,
    read_cases,
    refuse_not_finite,
    write_baseline,
)
from simlab.regress.gates import GATE_ALPHA, Outcome, exact, statistical
from simlab.regress.law_gate import LAW_GATE_SEEDS, law
from simlab.regress.theory_gate import THEORY_GATE_SEEDS, predicted_rows, theory
from simlab.theory.mean_field import Prediction

if TYPE_CHECKING:
    import pandas as pd

    from simlab.experiment import Prepared, RunResult

_BASELINES = Path("tests/baselines")
_FIGURES_FOLDER = Path("outputs/regress")  # of cases that fail, where --html names no other folder
_EPILOG = """\
A case is a file NAME.yaml beside its recorded curves NAME.csv:

  description: OLMo-2-7B's shape at init
  overrides: [model=olmo2_7b, seeds=10]   # as simlab.run takes them
  gates: [exact, statistical, law]        # each is held against a new run
  quantities: [norm, cosine]              # columns of curve.csv; optional

gates:
  exact        the first random init, or the checkpoint, gives the same numbers
  statistical  other random inits differ from the recorded ones by chance only
  law          random inits obey the additive law, whatever was recorded
  theory       random inits are what theory predicts; needs no record

exit status: 0 as recorded, 1 not as recorded, 2 a mistake, 130 Ctrl-C,
143 SIGTERM. Nothing is recorded but by --update.
"""


@contextmanager
def named(case: Case) -> Iterator[None]:
    """Put the case's name before the message of a mistake."""
    try:
        yield
    except MISTAKES as error:
        raise ConfigError(f"{case.name}: {explain(error)}") from error


def configure(case: Case) -> RunConfig:
    """The run that a case records. Raises ConfigError."""
    with named(case):
        config = compose(case.overrides)
    for gate in case.gates:
        if gate != "exact" and not config.seeds:
            raise ConfigError(f"{case.name}: gate {gate} needs random inits: seeds=…")
        if config.engine == "theory":
            raise ConfigError(
                f"{case.name}: engine=theory: gate {gate} needs curves that are measured"
            )
    return config


def to_check(case: Case, config: RunConfig, alpha: float) -> RunConfig:
    """The run that holds a case against its record: ``exact`` draws its first random init again, the
    other gates as many others as are recorded. Without a record it is the case's own run.

    alpha: the case's share of the statistical gate's false alarms.
    """
    seeds, count = config.seeds[:1] if "exact" in case.gates else (), len(config.seeds)
    if not case.recorded:
        seeds = config.seeds
    elif set(case.gates) - {"exact"}:
        first = max(config.seeds) + 1
        seeds += tuple(range(first, first + count))
    needed = {
        "law": LAW_GATE_SEEDS - ("exact" in case.gates),
        "statistical": next(n for n in range(2, 1000) if enough(n, n, alpha)),
        "theory": THEORY_GATE_SEEDS,
    }
    for gate, least in needed.items():
        if gate in case.gates and count < least:
            raise ConfigError(f"{case.name}: seeds={count}: gate {gate} needs at least {least}")
    return dataclasses.replace(config, seeds=seeds)


class CasePlan(NamedTuple):
    """A case to run: its record, the run, and the predicted curve where a gate needs it."""

    case: Case
    record: Baseline | None
    ready: Prepared
    prediction: Prediction | None

    @property
    def expected(self) -> pd.DataFrame:
        """The recorded curves; without a record, the predicted one."""
        if self.record:
            return self.record.frame
        assert self.prediction
        return predicted_rows(self.prediction)


def judge_case(plan: CasePlan, result: RunResult, alphas: Mapping[str, float]) -> list[Outcome]:
    """The outcome of each gate of a case for a new run.

    alphas: the case's share of the false alarms of the gates that share them.
    """
    case, new, dtype = plan.case, result.curve, result.config.dtype
    model = result.config.shape
    norms, outcomes = norms_of(model), []
    random = new[new["curve"] == "random"]
    for gate in case.gates:
        if gate == "theory":
            assert plan.prediction
            asked = case.quantities
            outcomes.append(theory(random, plan.prediction, asked, dtype, alphas[gate], norms))
            continue
        assert plan.record
        old, about = plan.record.frame, about_run(plan.ready)
        again = new["seed"].isin(old["seed"].unique())
        if gate == "exact":
            was = plan.record.about
            key = next((key for key in about if was.get(key) != about[key]), None)
            if key:
                why = f"recorded with {key} {was.get(key)}, run with {about[key]}"
                outcomes.append(Outcome(gate, False, f"other {key}", why))
                continue
            same = new[(new["curve"] != "random") | again]
            first = old[(old["curve"] != "random") | old["seed"].isin(result.config.seeds)]
            outcomes.append(exact(first, same, case.quantities, dtype, norms))
        elif gate == "statistical":
            drawn, fresh = old[old["curve"] == "random"], new[(new["curve"] == "random") & ~again]
            outcomes.append(statistical(drawn, fresh, case.quantities, dtype, alphas[gate], norms))
        else:
            outcomes.append(law(random, result.verdicts["random"], model.norm.gain, dtype))
    return outcomes


def about_run(ready: Prepared) -> dict[str, str]:
    """The settings that must be equal for equal numbers."""
    return {
        "engine": ready.config.engine,
        "device": ready.config.device.split(":")[0],
        "dtype": ready.config.dtype,
    }


def check(cases: Sequence[Case], show: Callable[[Checked], None]) -> list[Checked]:
    """Run cases and hold them against their records; every mistake is found before the first runs.

    Raises ConfigError.
    """
    from simlab.experiment import measure
    from simlab.report import progress

    alphas = {
        gate: GATE_ALPHA / max(1, sum(gate in case.gates for case in cases))
        for gate in ("statistical", "theory")
    }
    plans = [plan_case(case, alphas["statistical"]) for case in cases]
    done = []
    with progress.block_bar(sum(plan.ready.blocks for plan in plans)) as on_block:
        for plan in plans:
            start = time.perf_counter()
            result = measure(plan.ready, on_block)
            outcomes, took = judge_case(plan, result, alphas), time.perf_counter() - start
            done.append(Checked(plan.case, outcomes, plan.expected, result.curve, took))
            show(done[-1])
    return done


def plan_case(case: Case, alpha: float) -> CasePlan:
    """What is needed to run a case and to judge it. Raises ConfigError.

    alpha: the case's share of the statistical gate's false alarms.
    """
    from simlab.experiment import prepare

    kept, config = None, configure(case)
    if case.recorded:
        kept = read_baseline(case.curves, case.quantities)
        old = kept.about.get("overrides")
        if old != case.command:
            raise ConfigError(f"{case.name}: recorded with other overrides ({old}): --update it")
        if set(kept.frame.loc[kept.frame["curve"] == "random", "seed"]) != set(config.seeds):
            raise ConfigError(f"{case.curves}: doesn't have the seeds {list(config.seeds)}")
    with named(case):
        ready = prepare(to_check(case, config, alpha))
        prediction = whole_prediction(ready) if "theory" in case.gates else None
    return CasePlan(case, kept, ready, prediction)


def whole_prediction(ready: Prepared) -> Prediction:
    """The predicted curve of a run's random inits. Raises ConfigError if theory can't say it all."""
    from simlab.experiment.theory import predicted

    prediction = predicted(ready)
    if prediction.ends:
        raise ConfigError(f"gate theory: there is no prediction: {prediction.ends}")
    if ready.config.gradients and (prediction.no_gradient or ready.config.shape.tied):
        reason = prediction.no_gradient or "a tied head's is known to 45 % only"
        raise ConfigError(f"gate theory: gradients=true: there is no prediction: {reason}")
    return prediction


def record(case: Case, reason: str) -> Sequence[str]:
    """Run a case as it stands and keep its curves; what that changes, in lines. Raises ConfigError."""
    from simlab.experiment import measure, prepare, versions
    from simlab.regress.report import changes
    from simlab.report import progress

    if not case.recorded:
        raise ConfigError(f"{case.name}: gate theory needs no record: there is nothing to update")
    config = configure(case)
    to_check(case, config, GATE_ALPHA)
    with named(case):
        ready = prepare(config)
    with progress.block_bar(ready.blocks) as on_block:
        result = measure(ready, on_block)
    if result.summary["overflow"]:
        raise ConfigError(f"{case.name}: a curve overflows; only finite ones are recorded")
    about = {"case": case.name, "reason": reason, "overrides": case.command}
    about |= about_run(ready) | {k: v for k, v in versions().items() if k != "python"}
    before = None
    if case.curves.exists():
        with suppress(ConfigError):  # of other quantities, say: nothing to compare
            before = read_baseline(case.curves, case.quantities).frame
    refuse_not_finite(result.curve, case.quantities, case.curves)
    write_baseline(case.curves, result.curve, case.quantities, about)
    return changes(before, read_baseline(case.curves, case.quantities).frame, case.quantities)


def choose_cases(cases: Sequence[Case], patterns: Sequence[str]) -> list[Case]:
    """The cases of these names or shell patterns, each once; all cases if there is no pattern.

    Raises ConfigError for a pattern that matches no case.
    """
    known = {case.name: case for case in cases}
    chosen: dict[str, Case] = {}
    for pattern in patterns:
        names = fnmatch.filter(known, pattern)
        if not names:
            what = "no case matches" if _is_pattern(pattern) else "no such case"
            begun = fnmatch.filter(known, f"{pattern}*")
            hint = f"; did you mean '{pattern}*'?" if len(begun) > 1 else nearest(pattern, known)
            raise ConfigError(f"{pattern}: {what}; allowed: {', '.join(known)}{hint}")
        chosen |= {name: known[name] for name in names}
    return list(chosen.values()) or list(cases)


def _is_pattern(name: str) -> bool:
    return bool(set(name) & set("*?["))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m simlab.regress",
        description="Hold growth curves against recorded ones, or against theory's.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME",
        help="cases, or quoted patterns such as 'olmo2_*' (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--baselines", type=Path, default=_BASELINES, metavar="DIR",
        help=f"the folder with the cases (default: {_BASELINES})",
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="list the cases and run nothing")
    parser.add_argument("--update", metavar="NAME", help="record this case anew; needs --reason")
    parser.add_argument("--reason", metavar="TEXT", help="why, kept with the curves")
    parser.add_argument(
        "--html", type=Path, metavar="DIR",
        help="write pages with figures there (default: only the figures of cases that fail, in "
        f"{_FIGURES_FOLDER})",
    )  # fmt: skip
    parser.add_argument("--svg", action="store_true", help="write each figure as .svg, too")
    parser.add_argument("--junit", type=Path, metavar="FILE", help="write JUnit XML there, for CI")
    parser.add_argument("--version", action="version", version=f"simlab {__version__}")
    args = parser.parse_args()
    if args.update and (args.names or args.list or args.html or args.junit):
        parser.error("--update NAME goes with --reason, and with --baselines, alone")
    if bool(args.update) != bool(args.reason and args.reason.strip()):
        parser.error('--update NAME needs --reason "why", and the other way round')
    return args


def main() -> None:
    """The command. Exit status 0: as recorded; 1: not; 2: a mistake; 130: Ctrl-C; 143: SIGTERM."""
    signals.run_command(_command, "nothing was recorded")


def _command() -> None:
    """Do what the command line asks. Raises SystemExit."""
    args = parse()
    tune_process()
    with in_one_line():
        sys.exit(execute(args))


def execute(args: argparse.Namespace) -> int:
    """Do what was asked, and give the exit status. Raises ConfigError, OSError."""
    from simlab.regress import report

    cases = read_cases(args.baselines)
    if args.list:
        report.show_list([(case, _about(case)) for case in choose_cases(cases, args.names)])
        return 0
    if args.update:
        if _is_pattern(args.update):
            raise ConfigError(f"--update {args.update}: give one case's name, not a pattern")
        (case,) = choose_cases(cases, [args.update])
        for line in record(case, args.reason):
            print(line)
        print(case.curves)
        where = [] if args.baselines == _BASELINES else ["--baselines", str(args.baselines)]
        again = shlex.join(["python", "-m", "simlab.regress", *where, case.name])
        print(f"to hold it against a new run: {again}")
        return 0
    chosen = choose_cases(cases, args.names)
    if args.junit and args.junit.is_dir():
        raise ConfigError(f"--junit {args.junit}: a folder; give a file")
    for path in (args.html, args.junit.parent if args.junit else None):
        if path is not None:
            path.mkdir(parents=True, exist_ok=True)
    width = max(len(case.name) for case in chosen)
    done = check(chosen, lambda checked: report.show_line(checked, width))
    files = [report.write_junit(args.junit, done)] if args.junit else []
    figures, every = args.html or _FIGURES_FOLDER, args.html is not None
    files += report.draw_cases(done, figures, every=every, svg=args.svg)
    if args.html:
        from simlab.regress.page import write_report

        files += [report.write_page(args.html, done), write_report(args.html, done)]
    report.show_end(done, files)
    return 0 if all(checked.passed for checked in done) else 1


def _about(case: Case) -> Mapping[str, str]:
    return read_baseline(case.curves, case.quantities).about if case.curves.exists() else {}


if __name__ == "__main__":
    main()
