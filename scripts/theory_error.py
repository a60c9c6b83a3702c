"""Theory against simulation: python scripts/theory_error.py [--configs 100] [--output FOLDER].

Random configs over placements, inits, stds, MLPs, QK-norms, widths, depths, contexts and token laws
are measured by the weightless engine, with gradients, and predicted by ``simlab.theory.mean_field``.
The folder gets errors.csv (a row per config and sublayer), theory_error.md (percentiles of
|theory/mean − 1| per quantity, width and placement) and theory_error.png (the error against width).
The seeds' noise is part of the error, so more seeds make it smaller. Config n has seeds of its own,
from 1000·n on: with the same for all, their luck is every config's. 100 configs of 40 seeds take about
an hour on two cores. A band needs more seeds, and no gradients: --configs 111 --seeds 120
--widths 1024,2048 --no-gradients.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

WIDTHS = (128, 256, 512, 1024, 2048)
QUANTITIES = {  # column of the curve: where it is compared
    "mean_square": 1e-9, "norm": 1e-9, "mean_vector_norm": 1e-9, "token_cosine": 0.02,
    "branch_raw_mean_square": 1e-12, "eps_factor": 1e-3, "gradient_rms": 0.0, "gradient_norm": 0.0,
}  # fmt: skip
PERCENTILES = (50, 90, 99)
SEEDS_APART = 1000  # of the first seeds of two configs


def draw(
    rng: np.random.Generator,
    widths: Sequence[int] = WIDTHS,
    most_blocks: int = 16,
    placements: Sequence[str] = (),
) -> list[str]:
    """The overrides of one random config, of one of the widths and 2 to ``most_blocks`` blocks.

    placements: those to choose from; by default all.
    """
    from simlab.schemes.placement import PLACEMENTS

    def one(*options: Any) -> Any:
        return options[int(rng.integers(len(options)))]

    width, head_dim = one(*widths), one(32, 64)
    heads = width // head_dim
    kv_heads = max(1, heads // one(1, 1, 2, 4))
    batch, length = one((1, 64), (2, 32), (4, 16), (1, 16), (2, 8))
    placement, rule = (
        one(*(placements or PLACEMENTS)),
        one("normal", "normal", "mitchell", "llama", "fan_in", "gpt2"),
    )
    overrides = [
        "model=small", f"width={width}", f"heads={heads}", f"kv_heads={kv_heads}",
        f"model.head_dim={head_dim}", f"d_ff={int(width * rng.uniform(1.5, 4))}",
        f"depth={int(rng.integers(2, most_blocks + 1))}", f"vocab_size={one(100, 1000, 30000)}",
        f"norm={placement}", f"init={rule}", f"model.mlp={one('swiglu', 'swiglu', 'geglu', 'gelu')}",
        f"model.qk_norm={one('full', 'full', 'per_head', 'none')}",
        f"norm.type={one('rms', 'rms', 'layer')}", f"inputs={one('random', 'zipf')}",
        f"inputs.batch={batch}", f"inputs.length={length}", f"model.tied={one('false', 'true')}",
    ]  # fmt: skip
    if rule in ("normal", "llama", "gpt2"):
        overrides.append(f"init.std={np.exp(rng.uniform(np.log(0.01), np.log(0.06))):.3g}")
    if rng.random() < 0.2:
        overrides.append(f"model.window={one(4, 8)}")
    return overrides


def compare(overrides: Sequence[str], seeds: Sequence[int], gradients: bool = True) -> pd.DataFrame:
    """Every row of a config's curve: the seeds' mean, its standard error, and theory's value."""
    from simlab import compose
    from simlab.experiment import prepare, run
    from simlab.theory.mean_field import predict

    asked = [f"seeds={list(seeds)}".replace(" ", ""), f"gradients={str(gradients).lower()}"]
    config = compose([*overrides, *asked, "engine=weightless"])
    ready = prepare(config)
    start = time.perf_counter()
    prediction = predict(config.shape, config.init, ready.tokens, gradients=gradients)
    took = time.perf_counter() - start
    curve = run(config).curve
    grouped = curve.groupby(["sublayer", "kind"], sort=False)
    mean, sem, std = (getattr(grouped, name)(numeric_only=True) for name in ("mean", "sem", "std"))
    table: dict[str, Any] = {"theory_s": took, "ends": prediction.ends}
    rows = prediction.rows
    frame = mean.reset_index()[["sublayer", "kind"]].iloc[: len(rows)]
    for name in QUANTITIES:
        if name not in mean:  # gradients that weren't asked for
            continue
        table[name] = mean[name].to_numpy()[: len(rows)]
        table[f"{name}_sem"] = sem[name].to_numpy()[: len(rows)]
        table[f"{name}_theory"] = [getattr(row, name) for row in rows]
    table["std"] = std["mean_square"].to_numpy()[: len(rows)]
    table["band"] = [row.band for row in rows]
    shape = config.shape
    return frame.assign(
        **table, width=shape.width, placement=shape.norm.placement, overrides=" ".join(overrides)
    )


def errors(frame: pd.DataFrame) -> pd.DataFrame:
    """A long table: config's width and placement, quantity, error in percent.

    Rows whose value a norm pins (post-norm's mean square) are right by construction; of the band they
    are left out, since the engine's float32 rounds by more than such seeds differ.
    """
    parts = []
    for name, least in QUANTITIES.items():
        if name not in frame:
            continue
        measured, theory = frame[name].abs(), frame[f"{name}_theory"]
        error = 100 * (theory / frame[name] - 1).abs()
        keep = (measured > least) & theory.notna()
        parts.append(frame[keep].assign(quantity=name, error=error[keep]))
    free = frame["std"] > 1e-4 * frame["mean_square"]
    ratio = 100 * (frame["band"] / frame["std"] - 1).abs()
    parts.append(frame[free].assign(quantity="band", error=ratio[free]))
    return pd.concat(parts)[["width", "placement", "quantity", "error"]]


def percentiles(frame: pd.DataFrame, by: str) -> str:
    """A markdown table of the error's percentiles: a row per quantity, a column per value of ``by``."""

    def cell(values: pd.Series) -> str:
        return " / ".join(f"{np.percentile(values, p):.2g}" for p in PERCENTILES)

    table = frame.groupby(["quantity", by])["error"].apply(cell).unstack(by)
    lines = [
        f"| quantity | {' | '.join(map(str, table.columns))} |",
        "|---" * (table.shape[1] + 1) + "|",
    ]
    lines += [f"| {name} | {' | '.join(row.fillna(''))} |" for name, row in table.iterrows()]
    return "\n".join(lines)


def draw_figure(frame: pd.DataFrame, path: Path) -> None:
    """The median error of every quantity against width."""
    import seaborn as sns

    grid = sns.relplot(
        frame, x="width", y="error", hue="quantity", kind="line", marker="o", estimator="median",
        errorbar=None, height=4.5, aspect=1.4,
    )  # fmt: skip
    grid.set(xscale="log", yscale="log", ylabel="median of |theory / mean of seeds − 1| (%)")
    for ax in grid.axes.flat:
        ax.set_xticks(WIDTHS, map(str, WIDTHS))
        ax.minorticks_off()
    grid.savefig(path, dpi=100)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, predict, write the tables and the figure."""
    from simlab.schemes.placement import PLACEMENTS

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--configs", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=40)
    parser.add_argument("--first", type=int, default=0, help="seed of the first config's draw")
    widths = ",".join(map(str, WIDTHS))
    parser.add_argument("--widths", default=widths, help="measure the drawn configs of these alone")
    parser.add_argument("--placements", default="", help="draw configs of these alone: pre,post")
    parser.add_argument("--no-gradients", dest="gradients", action="store_false")
    parser.add_argument("--output", type=Path, default=Path("outputs/theory_error"))
    args = parser.parse_args(argv)
    if args.seeds < 2 or args.seeds > SEEDS_APART:
        parser.error(f"--seeds {args.seeds}: 2 to {SEEDS_APART}")
    wanted = set(args.widths.split(","))
    if unknown := wanted - set(widths.split(",")):
        parser.error(f"--widths {','.join(sorted(unknown))}: allowed are {widths}")
    placements = [name for name in args.placements.split(",") if name]
    if unknown := {*placements} - {*PLACEMENTS}:
        parser.error(
            f"--placements {','.join(sorted(unknown))}: allowed are {','.join(PLACEMENTS)}"
        )
    args.output.mkdir(parents=True, exist_ok=True)
    frames = []
    for number in range(args.first, args.first + args.configs):
        overrides = draw(np.random.default_rng(number), placements=placements)
        if dict(item.split("=", 1) for item in overrides)["width"] not in wanted:
            continue
        seeds = range(SEEDS_APART * number, SEEDS_APART * number + args.seeds)
        frame = compare(overrides, seeds, args.gradients).assign(config=number)
        worst = 100 * (frame["mean_square_theory"] / frame["mean_square"] - 1).abs().max()
        print(
            f"{number}: mean square off by at most {worst:.2f} %: {' '.join(overrides)}", flush=True
        )
        frames.append(frame)
        pd.concat(frames).to_csv(args.output / "errors.csv", index=False)
    if not frames:
        parser.error(f"none of {args.configs} configs has a width of {args.widths}")
    table = errors(pd.concat(frames))
    text = f"Percentiles {PERCENTILES} of |theory/mean of {args.seeds} seeds − 1|, in %.\n"
    for by in ("width", "placement"):
        text += f"\n{percentiles(table, by)}\n"
    (args.output / "theory_error.md").write_text(text, encoding="utf-8")
    draw_figure(table, args.output / "theory_error.png")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
