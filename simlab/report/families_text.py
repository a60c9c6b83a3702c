"""What is said of checkpoints beside their random inits: the table and the answer ``families``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
from rich.table import Table
from rich.text import Text

from simlab.analysis.headline import headline
from simlab.analysis.massive import massive_sentences
from simlab.analysis.numbers import short
from simlab.report.families import Survey, Surveyed, survey
from simlab.report.sweep_table import WIDTH
from simlab.report.swept import SweptJob, around_text, listed, missing_said, theory_said

NAME = 20  # characters that a name has at least, before columns of LEAST give way, in this order
LEAST = ("theory", "median")
GROWTH_HEADS = {
    "random": "random",
    "theory": "theory",
    "trained": "trained",
    "median": "median token",
}
GROWTH = "Growth is the mean square after the last block over that after the first"
LEAVES = "leaves: from which block on it is outside its random inits' band for good"
MASSIVE = (
    "massive: the first and the last block with massive activations, the largest |x| over the median "
    "|x| of its step, and its token"
)


def _growth(row: Mapping[str, Any], name: str) -> str:
    value = row[f"growth_{name}"]
    if pd.isna(value):
        return "–"
    guess = "?" if row["init_is_a_guess"] and name in ("random", "theory") else ""
    return f"×{short(float(value))}{guess}"


def _leaves(row: Mapping[str, Any]) -> str:
    """Where a checkpoint leaves the band for good: ``block 3``, ``never``, or that it isn't known."""
    if pd.isna(row["ratio"]):
        return "–"
    at = row["leaves_block"]
    return "never" if pd.isna(at) else f"block {int(at)}" if at else "start"


def _massive(row: Mapping[str, Any]) -> list[str]:
    """Massive activations in three texts: the blocks, the size, the token; ``none`` alone."""
    if not row["massive_steps"]:
        return ["none"]
    start, end = int(row["massive_from"]), int(row["massive_to"])
    where = f"blocks {start}–{end}" if start else f"start–block {end}"
    where = where if start < end else f"block {start}" if start else "embedding"
    size = f"×{short(row['max_abs'] / row['median_abs'])}" if row["median_abs"] else "×∞"
    return [where, size, str(row["massive_token"]).replace("position", "pos.")]


def _explained(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the columns are, as far as these rows need it."""
    start = " (start: from the embedding on)" if any(_leaves(r) == "start" for r in rows) else ""
    massive = [MASSIVE] if any(row["massive_steps"] for row in rows) else []
    guess = ["?: a guess, its file doesn't say how it was initialised"]
    guesses = guess if any(row["init_is_a_guess"] for row in rows) else []
    return "; ".join([GROWTH, f"{LEAVES}{start}", *massive, *guesses])


def survey_table(found: Survey, width: int = WIDTH) -> Table:
    """Three lines per checkpoint, for a terminal; the caption explains.

    width: of the terminal; columns of LEAST give way.
    """
    shown = [name for name in GROWTH_HEADS if found.table[f"growth_{name}"].notna().any()]
    rows = found.records
    massive = min(17, max(len(text) for row in rows for text in ["massive", *_massive(row)]))
    without = []
    for least in ("", *LEAST):
        if least in shown:
            shown.remove(least)
            without.append(GROWTH_HEADS[least])
        cells = {name: [_growth(row, name) for row in rows] for name in shown}
        wide = [
            max(map(len, [*GROWTH_HEADS[name].split(), *texts])) for name, texts in cells.items()
        ]
        room = width - sum(wide) - len(wide) - max(len(_leaves(row)) for row in rows) - massive - 3
        if room >= NAME:
            break
    notes = [f"{_explained(rows)}."]
    notes += [f"No room for {listed(without)}; families.csv has all."] if without else []
    table = Table(
        box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold",
        caption=Text("\n".join(notes)), caption_justify="left",
    )  # fmt: skip
    table.add_column("checkpoint", max_width=max(room, 9), overflow="fold")
    for name in shown:
        table.add_column(GROWTH_HEADS[name].replace(" ", "\n"), justify="right", no_wrap=True)
    table.add_column("leaves", no_wrap=True)
    table.add_column("massive", max_width=massive)
    for i, row in enumerate(rows):
        about = f"{row['checkpoint']}\n{row['model_type']}, {row['depth']} blocks\n{row['read']}"
        growths = [texts[i] for texts in cells.values()]
        table.add_row(*map(Text, (about, *growths, _leaves(row), "\n".join(_massive(row)))))
    return table


def _cells(found: Survey) -> list[list[str]]:
    """The same, a line per checkpoint; the first has the heads."""
    heads = ["checkpoint", "type", "blocks", "read", *GROWTH_HEADS.values(), "leaves", "massive"]
    rows = [heads]
    for row in found.records:
        cells = [row["checkpoint"], row["model_type"], str(row["depth"]), row["read"]]
        cells += [_growth(row, name) for name in GROWTH_HEADS]
        rows.append([*cells, _leaves(row), ", ".join(_massive(row))])
    return rows


def _markdown(found: Survey) -> str:
    heads, *rows = _cells(found)
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def page_data(found: Survey) -> dict[str, Any]:
    """What report.html has in place of another sweep's: all inits shown, depths aligned."""
    heads, *rows = _cells(found)
    table = {"heads": heads, "rows": rows}
    return {
        "headline": line(found), "table": table, "off": [], "share": True, "noun": "checkpoint",
    }  # fmt: skip


def without_tables(text: str) -> str:
    """The answer without its table and what explains it, for a screen that shows another."""
    parts = text.split("\n\n")
    return "\n\n".join(p for p in parts if not p.startswith(("| ", GROWTH)))


def answer(jobs: Sequence[SweptJob]) -> str:
    """What training made of each checkpoint's residual stream, as Markdown."""
    found = survey(jobs)
    members = found.members if found else []
    lines = list(_header(members))
    if found:
        lines += [_markdown(found), f"{_explained(found.records)}."]
        lines += [f"**Together:** {line(found)} {_grown(found.records)}", *map(_said, members)]
        lines += theory_said([m.curves[m.inits] for m in members if m.inits])
    curves = [curve for member in members for curve in member.curves.values()]
    return "\n\n".join([*lines, *missing_said(jobs, curves)]) + "\n"


def _header(members: Sequence[Surveyed]) -> Iterator[str]:
    title = "**What has training made of the residual stream?**"
    if not members:
        yield f"{title} No checkpoint has been measured."
        return
    given: dict[str, list[str]] = {}
    for member in members:
        given.setdefault(_tokens(member.summary), []).append(member.label)
    texts = [f"{text} ({listed(labels)})" for text, labels in given.items()]
    kinds = len({member.about["model_type"] for member in members})
    what = f"{len(members)} checkpoint{'s' if len(members) > 1 else ''} of {kinds} model type"
    what += "s" if kinds > 1 else ""
    if any(member.inits for member in members):
        what += ", each beside random inits of its own shape on the same tokens"
    yield f"{title} {what}: {listed(texts) if len(given) > 1 else next(iter(given))}."


def _tokens(summary: Mapping[str, Any]) -> str:
    """Which tokens a job had: ``2 × 64 tokens of the text, with <s>``."""
    (sequences, length), kind = summary["tokens"], summary["config"]["inputs"]["kind"]
    size = f"{sequences // summary.get('streams', 1)} × {length}"
    if kind != "text":
        return f"{size} {kind} tokens"
    if summary["token_unit"] == "bytes":
        return f"{size} bytes of the text, for want of a tokenizer"
    return f"{size} tokens of the text by its own tokenizer{around_text(summary)}"


def line(found: Survey) -> str:
    """How many checkpoints leave their random inits, and how many have massive activations."""
    rows = found.records
    held = [row for row in rows if pd.notna(row["ratio"])]
    left = [row["checkpoint"] for row in held if pd.notna(row["leaves_block"])]
    massive = [row["checkpoint"] for row in rows if row["massive_steps"]]
    if len(rows) == 1:
        end = f"ends {'outside' if left else 'within'} its random inits' band and " if held else ""
        return f"The checkpoint {end}has {'' if massive else 'no '}massive activations."
    bands = ("ends outside its random inits' band", "end outside their random inits' band")
    texts = [_of(left, len(held), *bands)] if held else []
    texts.append(_of(massive, len(rows), "has massive activations", "have massive activations"))
    text = "; ".join(texts)
    return f"{text[0].upper()}{text[1:]}."


def _of(some: Sequence[str], count: int, one: str, several: str) -> str:
    """``2 of 3 checkpoints end (A and B)``, ``none of 3 checkpoints ends``; one, several: the verb."""
    if not some:
        return f"none of {count} checkpoints {one}"
    if len(some) == count > 1:
        return f"{'both' if count == 2 else f'all {count}'} checkpoints {several}"
    return (
        f"{len(some)} of {count} checkpoints {one if len(some) == 1 else several} ({listed(some)})"
    )


def _grown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The range of the growths."""

    def between(column: str) -> str:
        known = [(r[column], r["checkpoint"]) for r in rows if pd.notna(r[column])]
        (low, first), (high, last) = min(known), max(known)
        if short(low) == short(high):
            return f"a factor of {short(low)}"
        return f"factors of {short(low)} ({first}) to {short(high)} ({last})"

    inits = "growth_random" if any(pd.notna(r["growth_random"]) for r in rows) else "growth_theory"
    text = "From the first block's end to the last's the mean square "
    if any(pd.notna(row[inits]) for row in rows):
        text += f"of random inits grows by {between(inits)}, that "
    return f"{text}of the checkpoints' median tokens by {between('growth_median')}."


def _said(member: Surveyed) -> str:
    """A checkpoint's paragraph."""
    # Late: it imports this module.
    from simlab.report.console import overflow_lines, streams_lines

    sequences, length = member.summary["tokens"]
    whole = not any(row["curve"] == "checkpoint" for row in member.summary["overflow"])
    said = [headline(member.frame, member.summary)]
    if origin := member.summary.get("init_origin"):
        said.append(f"{origin[0].upper()}{origin[1:]}.")
    said += massive_sentences(member.rows, sequences, length, whole)
    said += streams_lines(member.summary) + overflow_lines(member.summary["overflow"])
    about = f"{member.about['model_type']}, {member.depth} blocks, {member.read}"
    return f"**{member.label}** ({about}): {' '.join(said)}"
