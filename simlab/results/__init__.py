"""Finished runs and sweeps as Python objects: their curves, verdicts, plots, files and displays.

``simlab.measure``, ``simlab.multirun`` and ``simlab.load`` (simlab/api.py) make them.
"""

from simlab.results.run import Result, read_result, small
from simlab.results.several import Comparison, SweepResult

__all__ = ["Comparison", "Result", "SweepResult", "read_result", "small"]
