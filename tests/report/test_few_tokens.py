"""A checkpoint of which one token makes the mean square: headline, main figure, table, page."""

import io
import itertools
import re

import numpy as np
import pandas as pd
import pytest
from conftest import tiny
from matplotlib.backends.backend_agg import FigureCanvasAgg
from rich.console import Console

from simlab.analysis.compare import departure, sentences, with_outside
from simlab.analysis.headline import headline
from simlab.analysis.tokens import skewed, token_apart
from simlab.experiment import run
from simlab.report.growth_figure import growth_figure
from simlab.report.page.build import run_page
from simlab.report.table import beside_table
from simlab.store import plain_values

SHAPE = (2, 24)  # sequences and their length
AT = 24 + 13  # position 13 of the second


@pytest.fixture(scope="module")
def result():
    return run(tiny("seeds=9", "inputs.batch=2", "inputs.length=24"))


@pytest.fixture(scope="module")
def drawn(result):
    return result.curve


def planted(drawn, size, seeds=8, factor=1.0, at=AT):
    """Random inits, and one more as a checkpoint, times ``factor``, with one token of ``size``."""
    own = drawn[drawn["seed"] == 8].assign(curve="checkpoint", seed=0, massive=int(size > 0))
    for column in [c for c in own if c.startswith("mean_square")]:
        own[column] *= factor
    if size:
        own = own.assign(mean_square_max=size, max_token=at, max_abs=size**0.5 * 8)
        own["mean_square"] += size / (SHAPE[0] * SHAPE[1])
    return with_outside(pd.concat([own, drawn[drawn["seed"] < seeds]], ignore_index=True))


def said(frame):
    depth = int(frame["block"].max()) + 1
    return headline(frame, {"tokens": SHAPE, "config": {"model": {"depth": depth}}})


def test_headline_names_the_token_and_the_median(drawn):
    """The median token of one more random init is inside their band; eight times as large, outside."""
    text = said(planted(drawn, 1e4))
    assert re.fullmatch(
        r"The mean square of this checkpoint's median token stays within the random inits' band; one"
        r" token, at position 13 of sequence 2 \(of 2\), makes [\d.]+ % of the mean over tokens,"
        r" which ends [\d.]+× above theirs\.",
        text,
    ), text
    outside = said(planted(drawn, 1e4, factor=8.0))
    assert re.search(
        r"token ends [\d.]+× above a random init's, outside their band from the embedding on; one",
        outside,
    )
    assert not skewed(planted(drawn, 0.0))


def test_headline_with_few_seeds_is_the_checkpoint_s(drawn):
    frame = planted(drawn, 0.0, seeds=3, factor=4.0)
    last = frame["sublayer"].max()
    ends = frame[frame["sublayer"] == last].groupby("curve")["mean_square"].mean()
    ratio = f"{ends['checkpoint'] / ends['random']:.3g}"
    assert said(frame) == (
        f"The mean square of this checkpoint's residual stream ends {ratio}×"
        " above the mean of 3 random inits; 8 would tell whether that is chance."
    )
    text = said(planted(drawn, 1e4, seeds=3, factor=0.25))
    assert re.search(
        "median token ends [\\d.]+× below the mean of 3 random inits; one token, at", text
    )


def test_comparison_names_the_token(drawn):
    """Its ratio is the mean's; without such a token nothing more is said."""
    texts = []
    for size in (1e4, 0.0):
        frame = planted(drawn, size, factor=8.0)
        texts.append(sentences(departure(frame), frame, SHAPE, int(frame["sublayer"].max()))[0])
    ends = r"ends [\d.]+× above them"
    token = r"; one token, at position 13 of sequence 2 \(of 2\), makes [\d.]+ % of the mean"
    assert re.search(rf"{ends}{token} over tokens\.$", texts[0]), texts[0]
    assert re.search(rf"{ends}\.$", texts[1]), texts[1]


def test_share_of_the_mean(drawn):
    """At the end, or up to some step if it is erased there; a tenth isn't one token's."""
    frame = planted(drawn, 1e4)
    own = frame["curve"] == "checkpoint"
    last = frame[own].iloc[-1]
    share = 1e4 / 48 / last["mean_square"]
    assert token_apart(frame, SHAPE).share == pytest.approx(share)
    assert re.search(
        rf"^one token, at position 13 of sequence 2 \(of 2\), makes {100 * share - 0.05:.1f} % of",
        token_apart(frame, SHAPE).sentence,
    )
    erased = frame.copy()
    for column in ("mean_square", "mean_square_max"):
        erased.loc[own & (frame["sublayer"] > 2), column] = last["mean_square_median"]
    assert "makes up to 99.9 % of the mean" in token_apart(erased, SHAPE).sentence
    # A median that is small besides doesn't make a share of its row the largest one.
    skewest = own & (frame["sublayer"] == 1)
    erased.loc[skewest, "mean_square_median"] /= 1e6
    erased.loc[skewest, "mean_square"] *= 2
    assert "makes up to 99.9 % of the mean" in token_apart(erased, SHAPE).sentence
    frame["mean_square"] *= 10
    few = token_apart(frame, SHAPE)
    assert few.share == pytest.approx(share / 10)
    # More than nine tenths of the sum, 10·1e4, are of others, of which none is above 1e4.
    assert few.sentence.startswith(
        "the largest of at least 11 large tokens, at position 13 of sequence"
    )
    first = planted(drawn, 1e4, at=24)
    first.loc[own, "mean_square_first"], first.loc[own, "mean_square"] = 1e4, 2e4 / 48 / 0.9501
    assert token_apart(first, SHAPE).sentence == (
        "position 0 of every sequence (at least 1 more large) makes 95 % of the mean over tokens"
    )


@pytest.mark.parametrize("gradients", [False, True])
def test_figure_draws_the_median_and_names_the_token(drawn, gradients):
    frame = planted(drawn, 1e4, factor=1.5)
    if gradients:
        frame["gradient_rms"] = 1.0
    figure = growth_figure(frame, "t", ["a"], SHAPE)
    main, *_ = figure.axes
    own = frame[frame["curve"] == "checkpoint"]
    for column in ("mean_square_median", "mean_square_max"):
        lines = [line.get_ydata() for line in main.lines]
        assert any(len(y) == len(own) and np.allclose(y, own[column]) for y in lines), column
    assert own["mean_square_p95"].max() < main.get_ylim()[1] < 100
    named = [text.get_text() for text in main.texts]
    assert "largest token" in named
    assert "position 13 of sequence 2 (of 2)" in named
    assert "up to 10⁴, off this axis" in named
    assert not any("outside" in text for text in named), (
        "that is the mean's, which isn't drawn here"
    )
    # No text leaves the figure, and no panel's title runs into another's.
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [text.get_window_extent(renderer) for text in figure.texts]
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 for box in boxes)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_figure_without_such_a_token(drawn):
    named = [
        text.get_text() for text in growth_figure(planted(drawn, 0.0), "t", ["a"]).axes[0].texts
    ]
    assert "checkpoint" in named
    assert "largest token" not in named


def test_a_checkpoint_alone_is_beside_no_law(drawn):
    """Its laws are about the mean over tokens, which has a panel of its own."""
    frame = planted(drawn, 1e4)
    main, mean, *_ = growth_figure(frame[frame["curve"] == "checkpoint"], "t", ["a"]).axes
    assert not any("law" in text.get_text() or "√2" in text.get_text() for text in main.texts)
    assert len(main.lines) == 2
    assert len(mean.lines) > 1


def test_headline_of_a_prediction_that_ends_early(drawn):
    """Held against random inits where they end, in a sentence that runs no two numbers together."""
    frame = planted(drawn, 1e4, seeds=3)
    text = said(frame[(frame["curve"] == "checkpoint") | (frame["sublayer"] <= 2)])
    assert len(re.findall(r"is, at sublayer 2, [\d.e]+× (above|below)", text)) == 2


def test_narrow_table_keeps_the_median_token(drawn):
    """The mean's ratio to random inits goes first; without such a token, the median does."""

    def head(frame):
        console = Console(width=60, record=True, file=io.StringIO())
        console.print(beside_table(frame, 60))
        return console.export_text().splitlines()[0]

    assert "median token" in head(planted(drawn, 1e4))
    assert "median token" not in head(planted(drawn, 0.0))


@pytest.mark.parametrize(("size", "first"), [(1e4, "mean_square_median"), (0.0, "mean_square")])
def test_page_opens_on_what_is_worth_seeing(result, drawn, size, first):
    summary = {**plain_values(result.summary), "tokens": SHAPE}
    html = run_page(planted(drawn, size), summary, "t", "c", "today")
    assert f'"quantity":"{first}"' in html
