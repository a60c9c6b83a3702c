"""streams.png: a line for each vector of a state, and one for those that coincide."""

import base64
import re

import numpy as np
import pandas as pd
import pytest
from conftest import tiny

from simlab.experiment import run
from simlab.report.streams_figure import TOLD_APART, streams_figure, vectors_line
from simlab.results import Result


def made_up(vectors, seeds=2, steps=5, now_and_then=False):
    """vectors: a factor of each vector's mean square, which is step + 1."""
    kinds = ["embedding", *["attention", "mlp"] * steps]
    return pd.DataFrame(
        {
            "curve": "random", "seed": seed, "sublayer": step, "kind": kinds[step], "stream": i,
            "mean_square": factor * (step + 1) * (1 + 0.1 * seed), "token_cosine": 0.5,
            "cosine_watched": 1 - 0.1 * i,
        }
        for seed in range(seeds) for step in range(steps) for i, factor in enumerate(vectors)
        if not (now_and_then and i and step % 2 == 0)
    )  # fmt: skip


def lines(figure, panel=0):
    return figure.axes[panel].get_lines()


def texts(figure):
    return " | ".join(text.get_text() for text in figure.texts)


def test_lines_are_means_over_seeds():
    frame = made_up([1, 2, 4])
    figure = streams_figure(frame, "a title")
    assert len(figure.axes) == 3
    for line, factor in zip(lines(figure), (1, 2, 4), strict=True):
        np.testing.assert_allclose(line.get_ydata(), factor * 1.05 * np.arange(1, 6))
    assert len(figure.axes[0].collections) == 3  # bands
    said = texts(figure)
    for part in ("vector 0, the stream", "vector 2", "2 seeds", "a title", "and all differ"):
        assert part in said, part


def test_vectors_that_coincide_are_one_line():
    same = made_up([1, 1, 1, 1]).assign(cosine_watched=1.0)
    figure = streams_figure(same, "")
    assert [len(lines(figure, i)) for i in range(3)] == [1, 1, 1]
    assert "vectors 0 to 3" in texts(figure)
    assert vectors_line(same) == "The 4 vectors that are carried from step to step coincide."
    other = same.assign(mean_square=same["mean_square"] * (1 + 0.002 * (same["stream"] == 2)))
    assert (
        vectors_line(other)
        == "Of 4 vectors that are carried from step to step, 2 can be told apart."
    )
    assert "vectors 0, 1, 3" in texts(streams_figure(other, ""))


def test_many_and_some_that_come_and_go():
    many = streams_figure(made_up(range(1, 2 + TOLD_APART + 1)), "")
    assert len(lines(many)) == TOLD_APART + 2
    assert len({line.get_color() for line in lines(many)}) == TOLD_APART + 2
    assert not many.axes[0].collections  # bands would hide the lines
    figure = streams_figure(made_up([1, 2], now_and_then=True), "")
    assert lines(figure)[1].get_xdata().tolist() == [1, 3]
    assert "Up to 2 vectors" in texts(figure)


def test_the_stream_alone_is_no_figure():
    """As of a run whose curves end before there is another vector."""
    assert [streams_figure(each, "") for each in (None, made_up([1]), made_up([1])[:0])] == [
        None
    ] * 3


def test_a_zero_needs_a_linear_axis():
    scales = [streams_figure(made_up(f), "").axes[0].get_yscale() for f in ([1, 2], [1, 0])]
    assert scales == ["log", "linear"]


@pytest.mark.parametrize("norm", ["hyper_connections", "pre"])
def test_a_runs_folder_and_page(norm, tmp_path):
    """The page holds the file's picture; a placement that carries the stream alone has neither."""
    result = run(tiny(f"norm={norm}", "seeds=1"))
    saved = Result(result.curve, result.summary, streams=result.streams).save(tmp_path / "run")
    pages = [(saved / "report.html").read_text(encoding="utf-8")]
    pages.append(Result(result.curve, result.summary, streams=result.streams).page())
    assert (saved / "streams.png").exists() == (norm == "hyper_connections")
    for page in pages:
        found = re.findall(r'<img class="figure"[^>]*base64,([^"]*)"', page)
        drawn = [each.read_bytes() for each in saved.glob("streams.png")]
        assert [base64.b64decode(text) for text in found] == drawn
        assert "<!--streams-->" not in page
