"""Progress in a terminal, in a notebook, in neither, and of a process's."""

import pytest
import rich.console

from simlab.report import progress


@pytest.fixture
def notebook(monkeypatch):
    monkeypatch.setattr(rich.console, "_is_jupyter", lambda: True)
    monkeypatch.setattr(progress, "DELAY", 0)


@pytest.mark.filterwarnings("error")
def test_a_notebook_has_a_bar(notebook, capsys):
    with progress.block_bar(2) as advance:
        advance()
        advance()
    err = capsys.readouterr().err
    assert "blocks" in err
    assert "0/2" in err
    assert err.rsplit("\r", 1)[-1] == ""  # and nothing is left of it
    assert "\x1b[" not in err


def test_a_pipe_gets_no_bar(monkeypatch, capsys):
    """FORCE_COLOR asks for colours; a bar in a pipe would be pages of escape sequences."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress.block_bar(2) as advance, progress.sweep(1, 2) as bar:
        advance()
        bar.reached(1, 2)
    assert capsys.readouterr().err == ""


def test_a_line_now_and_then(monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", 0)
    with progress.sweep(3, 6) as bar:
        bar.block()
        bar.reached(2, 4)
    assert capsys.readouterr().err == ("simlab: 0 of 3 jobs done\nsimlab: 2 of 3 jobs done\n")


@pytest.mark.parametrize("drawn", [True, False])
def test_of_another_process(monkeypatch, capsys, drawn):
    """Its lines move a bar where there can be one, or else are printed; others are the caller's."""
    monkeypatch.setattr(rich.console, "_is_jupyter", lambda: drawn)
    with progress.of_process() as (env, show):
        assert (env.get(progress._EVERY) == "0.5") == drawn
        assert show("simlab: 2 of 3 jobs done")
        assert not show("simlab: depth=0: allowed: an integer")
    err = capsys.readouterr().err
    if drawn:
        assert "2/3" in err
    else:
        assert err == "simlab: 2 of 3 jobs done\n"
