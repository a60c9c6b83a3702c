"""``python -m simlab.sweep DIR``: one report over a sweep, from its files alone."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from simlab import signals

_EPILOG = """\
A sweep is made by python -m simlab.run -m KEY=A,B, which ends with this
report. In the sweep's folder it writes anew:

  sweep.parquet  every job's curve.csv, with the swept keys as columns
  jobs.csv       a row per job and curve: growth, exponents, laws, verdict
  report.html    a page with the figure, the jobs and the command
  *.png          figures, chosen by what was swept
  streams.parquet every streams.csv, where jobs have one
  answer.md      a written answer, where the sweep's config asks for one

Jobs that failed or are unfinished are listed, each with its error.
exit status: 0 every job is done, 1 one is not, 2 a mistake, 130 Ctrl-C,
143 SIGTERM.
"""


def main() -> None:
    """The command. Exit status 0 where every job is done, 1 where not, 2 for a mistake.

    SIGINT (Ctrl-C): 130; SIGTERM: 143.
    """
    signals.run_command(_command, "the same command writes the report again")


def _command() -> None:
    """Write and show the report. Raises SystemExit."""
    from simlab import __version__

    parser = argparse.ArgumentParser(
        prog="python -m simlab.sweep",
        description="One report over a sweep, from its files alone.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="DIR", help="the folder of a sweep, finished or not")
    parser.add_argument("--svg", action="store_true", help="write each figure as .svg, too")
    parser.add_argument("--version", action="version", version=f"simlab {__version__}")
    args = parser.parse_args()

    from simlab.budget.machine import PANDAS, refuse_imports
    from simlab.config.cli_errors import in_one_line

    with in_one_line():
        refuse_imports(PANDAS)
        from simlab.sweep.report import report

        whole = report(Path(args.folder), svg=args.svg)
    sys.exit(0 if whole else 1)


if __name__ == "__main__":
    main()
