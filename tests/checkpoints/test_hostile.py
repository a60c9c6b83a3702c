"""scripts/try_hostile.py: a few of its inputs, and that it sees what is wrong."""

import pytest
import try_hostile

from simlab import experiment
from simlab.config import ConfigError


@pytest.mark.slow
def test_some_hostile_inputs(capsys):
    """The other classes' are in test_strangers, a hundred times as many."""
    assert try_hostile.main(["--count", "3", "--only", "tokenizer", "changing"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "| 3 | 3 |" in line]
    assert len(rows) == 2


def test_what_is_wrong_is_seen(tmp_path, monkeypatch):
    """Negative control: a traceback, two lines, a stray file, and what takes too much."""

    def ended(error=None, note=""):
        def run(config):
            if note:
                print(note)
            if error is None:
                (tmp_path / "made").touch()
            else:
                raise error

        monkeypatch.setattr(experiment, "run", run)
        return try_hostile.attempt(tmp_path, [], try_hostile.nothing, 0)

    assert ended(ConfigError("one line")) == "2"
    assert ended(ConfigError("one line"), "another").startswith("not one line")
    assert ended(KeyError("x")).startswith("KeyError")
    assert ended() == "files were made"
    assert try_hostile.judged("x", "text", "0", 21.0, 0.0).startswith("it took")
    assert try_hostile.judged("x", "text", "0", 19.0, 0.0) == "0"


def test_a_child_that_dies_is_one_fault(tmp_path, monkeypatch):
    """A signal, of SIGBUS for instance, ends the process: the input counts, and the rest go on."""
    made = []

    def run(command, **_):
        made.append(command[4])
        rest = '["a", "0", 0.1, 1.0]\n' * (2 if len(made) == 1 else 1)
        return try_hostile.subprocess.CompletedProcess(
            command, -7 if len(made) == 1 else 0, rest, ""
        )

    monkeypatch.setattr(try_hostile.subprocess, "run", run)
    rows = try_hostile.tried("text", 4, tmp_path)
    assert [row[1][:8] for row in rows] == ["0", "0", "died: -7", "0"]
    assert made == ["0", "3"]
