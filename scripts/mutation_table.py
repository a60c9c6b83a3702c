"""Which mistakes which gate catches: python scripts/mutation_table.py [NAME …].

A markdown row for each mutation of the catalogue (all, or those named): which gates of
``simlab.regress`` fail, where the first of them sees the mistake and what it blames, and if the
mistaken model departs from transformers' with the same weights (parity).
"""

from __future__ import annotations

import argparse
import atexit
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from mutations import MUTATIONS, SETTINGS, Mutation, applied

from simlab import RunConfig, build_model, compose
from simlab.analysis import LAWS
from simlab.analysis.curve import PREDICTED
from simlab.checkpoints.checkpoint import Checkpoint
from simlab.experiment import RunResult, measure, prepare
from simlab.experiment.theory import predicted
from simlab.measurement.engine import measure_curves
from simlab.measurement.statistics import STATISTICS
from simlab.regress.blame import norms_of
from simlab.regress.cases import GATES
from simlab.regress.gates import ROW_KEYS, Outcome, exact, statistical
from simlab.regress.law_gate import law
from simlab.regress.theory_gate import ACCURACY, theory

SEEDS = 32  # recorded, and as many others
MARKS = {True: "", False: "caught"}
OF_A_STATE = ["norm", "mean_square", "mean", "mean_abs", "max_abs"]  # what parity compares
NOT_STATISTICS = (
    *ROW_KEYS, "max_token", "massive", "outside", *(law.column for law in LAWS.values()), *PREDICTED
)  # fmt: skip


@cache
def config_of(setting: str) -> RunConfig:
    """One of SETTINGS, checked."""
    return compose(SETTINGS[setting])


def result(setting: str, seeds: Sequence[int], mutation: Mutation | None = None) -> RunResult:
    """The curves of these random inits, all with the same tokens."""
    config = replace(config_of(setting), seeds=tuple(seeds))
    torch.manual_seed(0)  # simlab has no use for it, but a forgotten dropout has
    with applied(mutation):
        return measure(prepare(config))


@cache
def right(setting: str) -> RunResult:
    """What is recorded: the curves without a mistake."""
    return result(setting, range(SEEDS))


@cache
def law_holds(setting: str) -> bool:
    """True if the right model passes the law's gate, which then is one of the setting's."""
    recorded = right(setting)
    return law(recorded.curve, recorded.verdicts["random"], gain(setting), "float32").passed


def held_to_theory(setting: str, rows: pd.DataFrame, mutation: Mutation | None = None) -> Outcome:
    """The theory gate's outcome for random inits (their rows), with the mistake also in what theory
    shares with the model."""
    with applied(mutation):
        ready = prepare(config_of(setting))
        prediction = predicted(ready)
    if prediction.ends:
        return Outcome("theory", False, "no prediction", prediction.ends)
    return theory(rows, prediction, list(ACCURACY), "float32", norms=norms_of(ready.config.shape))


@cache
def theory_holds(setting: str) -> bool:
    """True if the right model passes the theory gate, which then is one of the setting's."""
    return held_to_theory(setting, right(setting).curve).passed


def gain(setting: str) -> float:
    """The initial gain of the setting's sublayer norms."""
    return config_of(setting).shape.norm.gain


def quantities(frame: pd.DataFrame) -> list[str]:
    """The names of all statistics in a frame."""
    return [str(name) for name in frame if name not in NOT_STATISTICS and frame[name].notna().any()]


def outcomes(
    setting: str,
    first: int,
    mutation: Mutation | None = None,
    seeds: int = SEEDS,
    gates: Sequence[str] = GATES,
) -> dict[str, Outcome]:
    """The outcome of each gate for a model with this mistake, its seeds counted from ``first``.

    ``law``, which needs 11 seeds, and ``theory``, which needs 8, only where the right model obeys it.
    """
    recorded = right(setting)
    again = [0] if "exact" in gates else []
    mistaken = result(setting, [*again, *range(first, first + seeds)], mutation)
    names, frame = quantities(recorded.curve), mistaken.curve
    norms = norms_of(recorded.config.shape)
    by_gate = {}
    if "exact" in gates:
        old, new = (rows[rows["seed"] == 0] for rows in (recorded.curve, frame))
        by_gate["exact"] = exact(old, new, names, "float32", norms)
    if "statistical" in gates:
        drawn = frame[frame["seed"] >= first]
        by_gate["statistical"] = statistical(recorded.curve, drawn, names, "float32", norms=norms)
    if "law" in gates and law_holds(setting):
        by_gate["law"] = law(frame, mistaken.verdicts["random"], gain(setting), "float32")
    if "theory" in gates and theory_holds(setting):
        by_gate["theory"] = held_to_theory(setting, frame, mutation)
    return by_gate


def judged(
    mutation: Mutation, seeds: int = SEEDS, gates: Sequence[str] = GATES
) -> dict[str, Outcome]:
    """The outcome of each gate for a mutation of the catalogue."""
    return outcomes(mutation.setting, 100, mutation, seeds, gates)


@cache
def reference(kv_heads: int) -> tuple[Path, torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """A tiny OLMo-2 by transformers: its folder, tokens, state after every sublayer, and logits."""
    tests = Path(__file__).parents[1] / "tests"
    sys.path[:0] = [str(tests), str(tests / "checkpoints")]
    from conftest import write_olmo
    from test_architectures import sublayer_states

    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    rope = {"rope_type": "default", "rope_theta": 1234.5}  # nothing at a default
    model = write_olmo(folder, num_key_value_heads=kv_heads, rope_parameters=rope)
    ids = torch.randint(61, (2, 23), generator=torch.Generator().manual_seed(0))
    return folder, ids, *sublayer_states(model, ids)


def parity(mutation: Mutation | None) -> bool:
    """True if simlab with this mistake departs from transformers: a state's statistics, or logits."""
    grouped = mutation is None or mutation.setting != "ungrouped"
    folder, ids, states, logits = reference(2 if grouped else 6)
    from conftest import PARITY, assert_parity

    close: dict[str, Any] = PARITY
    with applied(mutation), torch.no_grad():
        config = compose(["source=checkpoint", f"source.path={folder}", "device=cpu"])
        ours = build_model(config)(ids)
        (curve,) = measure_curves(Checkpoint(str(folder)), ids, torch.device("cpu"), torch.float32)
    names = list(STATISTICS)
    measured = torch.stack([row.values for row in curve.rows])[
        :, [names.index(n) for n in OF_A_STATE]
    ]
    expected = torch.tensor([of_a_state(state.double()) for state in states], dtype=measured.dtype)
    try:
        assert_parity(ours, logits)
        torch.testing.assert_close(measured, expected, **close)
    except AssertionError:
        return True
    return False


def of_a_state(x: torch.Tensor) -> list[float]:
    """OF_A_STATE, by the book."""
    numbers = x.norm(dim=-1).mean(), x.pow(2).mean(), x.mean(), x.abs().mean(), x.abs().max()
    return [number.item() for number in numbers]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="*", help="only these mutations")
    names = parser.parse_args().name
    torch.set_num_threads(1)  # matrices this small are quicker so
    print(f"| mutation | mistake | {' | '.join(GATES)} | parity | first seen at | blamed |")
    print("|---" * (len(GATES) + 5) + "|")
    for mutation in MUTATIONS:
        if names and mutation.name not in names:
            continue
        by_gate = judged(mutation)
        marks = [MARKS[by_gate[g].passed] if g in by_gate else "" for g in GATES]
        marks[GATES.index("statistical")] += (
            "" if by_gate["statistical"].passed != mutation.shifts else " (!)"
        )
        where = next((o.finding for o in reversed(by_gate.values()) if o.finding), None)
        cells = (
            f"{where.kind} {where.sublayer}, {where.quantity} | {where.blame}" if where else " | "
        )
        print(
            f"| {mutation.name} | {mutation.mistake} | {' | '.join(marks)} "
            f"| {MARKS[not parity(mutation)]} | {cells} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
