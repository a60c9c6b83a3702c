"""The terminal's output: a header, a progress bar, a table, the verdict, the files."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import Markdown, TableElement
from rich.table import Table
from rich.text import Text

from simlab.analysis.headline import headline
from simlab.analysis.numbers import plus_minus
from simlab.analysis.resampling import Estimate
from simlab.analysis.verdict import Verdict
from simlab.config import FamilyConfig, RunConfig
from simlab.config.title import title
from simlab.report.colours import LABELS
from simlab.report.families import Survey
from simlab.report.families_text import survey_table, without_tables
from simlab.report.sweep_table import WIDTH, failed_table, jobs_table
from simlab.report.table import (
    beside_table,
    block_table,
    departures_table,
    growth_table,
    lambda_table,
)

ENGINES_BESIDE = " for random inits; always dense for a checkpoint"  # where there are both


class _Tight(TableElement):
    """A table of Markdown without rich's empty columns, so that names are whole at 80 characters."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for table in super().__rich_console__(console, options):
            if isinstance(table, Table):
                table.show_edge = table.pad_edge = False
                table.collapse_padding = True
                for column in table.columns:
                    column.overflow = "fold"
            yield table


class _Answer(Markdown):
    elements: ClassVar = {**Markdown.elements, "table_open": _Tight}


def announce(
    config: RunConfig, parameters: int, unit: str, engines: Mapping[str, str], reason: str,
    init_origin: str | None = None, unread: str = "", special: str = "",
) -> None:  # fmt: skip
    """The header: the model, inputs and device of a run. unit: of the ids, tokens or bytes.

    engines: of each kind of curve; reason: why the random inits' is what it is. init_origin: where
    their init comes from, if it is the checkpoint's. unread: what lies beside the checkpoint's files
    and isn't read. special: the tokens that are put around a text.
    """
    model, inputs = config.shape, config.inputs
    heads = f"{model.heads} heads" + (
        f" ({model.kv_heads} kv)" if model.kv_heads != model.heads else ""
    )
    curves = ["the checkpoint"] if config.source.stored else []
    count = len(config.seeds)
    if "theory" in engines:
        curves.append("the predicted curve of random inits")
    elif count:
        curves.append(f"{count} random init{'s' if count > 1 else ''}")
    console = Console(highlight=False)
    console.print(Text(_whole_brackets(title(config), console.width), style="bold"))
    mlp = "" if model.mlp == "swiglu" else f", {model.mlp}"
    if model.experts:
        mlp += f", {model.experts} experts, {model.experts_per_token} per token"
    mlp += ", biases" if model.bias else ", q, k, v biases" if model.qkv_bias else ""
    sizes = f"{heads}, d_ff {model.d_ff}{mlp}, qk-norm {model.qk_norm}"
    sizes += ", values normed" * model.v_norm
    if model.attention_gate != "none":
        sizes += f", attention's output gated {model.attention_gate.replace('_', ' ')}"
    if model.value_embeddings != "none":
        where = {"all": "all layers", "alternate": "every second layer"}[model.value_embeddings]
        sizes += f", value embeddings in {where} times {model.value_embedding_scale:g}"
    if isinstance(model, FamilyConfig):
        sizes = f"computed by transformers' {model.family}, one block in memory at a time"
    console.print(f"{parameters:,} parameters, {sizes}")
    what = "forward and backward" if config.gradients else "forward"
    where = f", {config.dtype} on {config.device}" if config.measures else ""
    around = f" with {special}" if special else ""
    console.print(
        f"{' and '.join(curves)}, {inputs.batch} × {inputs.length} {inputs.kind} {unit}{around}, "
        f"{what}{where}",
        markup=False,
    )
    if unread:
        console.print(unread, markup=False)
    engine = f"{config.engine} engine ({reason})" if config.seeds else "dense engine"
    if "theory" in engines:
        engine = "theory engine (nothing is drawn: seeds, device and dtype aren't used)"
    if len(engines) > 1:
        engine += ENGINES_BESIDE
    console.print(engine)
    if init_origin and config.seeds:
        console.print(init_origin)
    console.print()


def show_sweep(
    heading: str,
    table: pd.DataFrame,
    swept: Mapping[str, Sequence[Any]],
    summaries: Mapping[str, Mapping[str, Any]],
    same: Mapping[str, Sequence[str]],
    failed: Sequence[Mapping[str, Any]],
    unfinished: int,
    files: Sequence[Path],
    answer: str | None = None,
    survey: Survey | None = None,
) -> None:
    """A sweep's tables, the files' paths with the first figure last, the answer; last what is missing.

    table: a row per job × curve. summaries: by job. same: jobs by the weight hash that they share.
    survey: of checkpoints beside random inits, whose table then stands in place of the others.
    """
    console = Console(highlight=False)
    console.print(Text(heading, style="bold"))
    if survey:
        console.print(survey_table(survey, min(console.width, WIDTH)))
        for line in survey.failed:  # their paths and commands aren't cut, to be copied
            console.print(Text(_indented(line, console.width)), soft_wrap=True)
        console.print()
        answer, failed = without_tables(answer or ""), []
    elif len(table):
        console.print(jobs_table(table, swept, min(console.width, WIDTH)))
        console.print()
    departures = departures_table(summaries)
    if departures.row_count > 1 and not survey:
        console.print(Text("Checkpoints beside random inits, at their last sublayer", style="bold"))
        console.print(departures)
        console.print()
    for weights, jobs in same.items():
        named = f"Jobs {', '.join(jobs)} have the same embedding and blocks"
        console.print(f"{named} (weight hash {weights[:12]})", soft_wrap=True)
    for path in (*files[:2], *files[2:][::-1]):
        console.print(str(path), soft_wrap=True, markup=False)
    if answer:
        console.print()
        console.print(_Answer(answer))
    if unfinished:
        count = f"{unfinished} job{'s are' if unfinished > 1 else ' is'} not finished"
        console.print(f"\n{count}; the sweep's command does what is missing")
    if failed:
        count = f"{len(failed)} job{'s' if len(failed) > 1 else ''} failed"
        console.print(Text(f"\n{count}", style="bold"))
        console.print(failed_table(failed))


def show_verdict(verdicts: Mapping[str, Verdict], summary: Mapping[str, Any]) -> None:
    """The verdict, a sentence a line, the main ones bold: before any file is written."""
    console = Console(highlight=False)
    main = headlines(verdicts, summary)
    for sentence in verdict_lines(verdicts, summary):
        style = "bold" if any(sentence in each for each in main) else ""
        console.print(Text(_indented(sentence, console.width), style=style))
    console.print()


def show_tables(
    frame: pd.DataFrame,
    verdicts: Mapping[str, Verdict],
    summary: Mapping[str, Any],
    verbose: bool = False,
) -> None:
    """The curves by block. A checkpoint and random inits share a table.

    verbose: a table of each kind of curve, with the laws, λ's, and the checkpoint's weight hash.
    """
    console = Console(highlight=False)
    if not verbose:
        width = console.width
        both = len(verdicts) > 1
        table = (
            beside_table(frame, width) if both else growth_table(frame, next(iter(verdicts)), width)
        )
        _print(console, table)
        return
    if "weight_hash" in summary:
        console.print(f"Checkpoint's weight hash: {summary['weight_hash'][:12]}")
    for name in verdicts:
        if len(verdicts) > 1:
            console.print(Text(LABELS[name].capitalize(), style="bold"))
        head = "predicted" if name == "theory" else "measured"
        values = summary["lambda"][name]
        for shown in (
            growth_table(frame, name, console.width),
            lambda_table(values, head),
            block_table(values),
        ):
            if shown.row_count:
                _print(console, shown)
                console.print()


def _print(console: Console, table: Table) -> None:
    """A table, beyond the terminal's width rather than with numbers cut."""
    console.print(table, soft_wrap=True, crop=False)


def _whole_brackets(text: str, width: int) -> str:
    """A text in lines of a terminal, none of which ends within a bracket."""
    held = re.sub(r"\([^()]*\)", lambda bracket: bracket[0].replace(" ", "\xa0"), text)
    return textwrap.fill(held, width, break_on_hyphens=False).replace("\xa0", " ")


def _indented(sentence: str, width: int) -> str:
    """A sentence in lines of a terminal, the second and further ones indented; none begins with %."""
    held = sentence.replace(" %", "\xa0%")
    lines = textwrap.wrap(
        held, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(lines).replace("\xa0", " ")


def show_files(files: Sequence[Path]) -> None:
    """Where a run's figure and page are; the other files lie beside them."""
    console = Console(highlight=False)
    for name, path in (("figure", "growth.png"), ("page", "report.html")):
        found = next((file for file in files if file.name == path), None)
        if found:
            console.print(f"{name:6} {found}", soft_wrap=True, markup=False)
    console.print()


def verdict_lines(verdicts: Mapping[str, Verdict], summary: Mapping[str, Any]) -> list[str]:
    """The verdicts' sentences, with the curve's name if there are several, the loss, and overflows."""
    lines = []
    for name, verdict in verdicts.items():
        first, *others = verdict.sentences
        lines += [_named(name, verdicts) + first, *others]
    lines += summary.get("comparison", [])
    for name, loss in summary.get("loss", {}).items():
        value = Estimate(**loss)
        if math.isfinite(value.value):
            chance = math.log(summary["config"]["model"]["vocab_size"])
            of = f" of the {LABELS[name]}" if len(verdicts) > 1 else ""
            lines.append(
                f"Next-token loss{of}: {plus_minus(value)} nats; ln(vocabulary) is {chance:.3f}."
            )
    lines += streams_lines(summary)
    return lines + overflow_lines(summary["overflow"]) + lost_lines(summary)


def _named(name: str, verdicts: Mapping[str, Verdict]) -> str:
    return f"{LABELS[name].capitalize()}: " if len(verdicts) > 1 else ""


def headlines(verdicts: Mapping[str, Verdict], summary: Mapping[str, Any]) -> list[str]:
    """The main ones of ``verdict_lines``, for which a figure's title has room.

    Of each verdict those on theory and on the growth, in one line.
    """
    lines = [_named(name, verdicts) + " ".join(v.main) for name, v in verdicts.items()]
    lines += summary.get("comparison", [])[:1]
    return lines + overflow_lines(summary["overflow"]) + lost_lines(summary)


def title_of(summary: Mapping[str, Any]) -> str:
    """Which model, norm and init a run is about; of a summary of an earlier version the model alone."""
    return str(summary.get("title") or summary["config"]["model"]["name"])


def figure_lines(curve: pd.DataFrame, summary: Mapping[str, Any]) -> list[str]:
    """A figure's title: the answer, the number of streams, and where values leave the dtype's range."""
    lost = overflow_lines(summary["overflow"]) + lost_lines(summary)
    return [headline(curve, summary), *streams_lines(summary), *lost]


def streams_lines(summary: Mapping[str, Any]) -> list[str]:
    """A line that says how the rows are over several residual streams; none of one stream."""
    if (streams := summary.get("streams", 1)) == 1:
        return []
    return [
        f"The model has {streams} residual streams, measured after each block: every row is over all "
        "of them, as if they were sequences."
    ]


def lost_lines(summary: Mapping[str, Any]) -> list[str]:
    """Where gradients left the dtype's range, one line per curve with its sublayer nearest the loss."""
    lines = []
    lost = summary.get("gradient_overflow", [])
    for name in dict.fromkeys(row["curve"] for row in lost):
        rows = [row["sublayer"] for row in lost if row["curve"] == name]
        seeds = f"{len(rows)} curve{'s' if len(rows) > 1 else ''}"
        lines.append(
            f"Gradient overflow ({LABELS[name]}, {seeds}): not finite at sublayer {max(rows)} and "
            "before; empty there."
        )
    return lines


def overflow_lines(overflow: Sequence[Mapping[str, object]]) -> list[str]:
    """Where curves left the dtype's range, one line per curve with its earliest sublayer."""
    lines = []
    for name in dict.fromkeys(row["curve"] for row in overflow):
        rows = [row for row in overflow if row["curve"] == name]
        first = min(rows, key=lambda row: int(str(row["sublayer"])))
        where = f"sublayer {first['sublayer']} ({first['kind']}"
        where += f" of block {int(str(first['block'])) + 1})" if first["block"] is not None else ")"
        seeds = f"{len(rows)} curve{'s' if len(rows) > 1 else ''}"
        said = f"first non-finite value at {where}; the curve ends before it"
        if first["sublayer"] == 0:
            said = "the embedding isn't finite, so there is no curve"
        lines.append(f"Overflow ({LABELS[str(name)]}, {seeds}): {said}.")
    return lines
