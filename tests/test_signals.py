"""SIGINT, SIGTERM and closed pipes, wherever they come; and limits of memory."""

import importlib
import os
import re
import signal
import subprocess
import sys

import pytest
import try_signals
from conftest import INPUTS, SHAPE, in_process

from simlab import signals

SMALL = [*SHAPE, *INPUTS, "device=cpu", "seeds=1"]


@pytest.fixture
def own_handlers():
    """pytest's, back again after a test that runs a command in this process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.slow
def test_signals_at_random_moments(capsys):
    """A few of the real kills that ``scripts/try_signals.py`` counts."""
    faults = try_signals.main(["--kills", "2", "--seed", "1", "--only", "run, theory"])
    assert faults == 0, capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("mode", ["run", "sweep"])
@pytest.mark.parametrize("then", ["goes on", "fails"])
def test_swallowed_signals_are_not_lost(tmp_path, monkeypatch, no_figures, number, mode, then):
    """A package that is being imported swallows the exception, or makes an ImportError of it."""
    sent = []

    def imported():
        try:
            sent.append(os.kill(os.getpid(), number))
        except KeyboardInterrupt:
            if then == "fails":
                raise ImportError("numpy._core.multiarray failed to import") from None

    monkeypatch.setattr("simlab.run.prefer_our_launchers", imported)
    sweep = ["-m", "norm=pre,post"] if mode == "sweep" else []
    done = in_process(*SMALL, *sweep, cwd=tmp_path)
    assert done.returncode == 128 + number
    assert done.stderr == "simlab: interrupted; nothing of the unfinished run was kept\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("swallowed", [True, False])
def test_signals_while_a_block_is_measured(tmp_path, monkeypatch, swallowed):
    """The run ends at its next block, and what it has written goes."""
    from simlab import experiment

    real, calls = experiment.measure, []

    def measure(ready, on_block):
        def block():
            calls.append(1)
            try:
                if len(calls) == 1:
                    os.kill(os.getpid(), signal.SIGTERM)
            except KeyboardInterrupt:
                if not swallowed:
                    raise
            on_block()

        return real(ready, block)

    monkeypatch.setattr(experiment, "measure", measure)
    done = in_process(*SMALL, cwd=tmp_path)
    assert (done.returncode, len(calls)) == (143, 1)
    assert done.stderr == "simlab: interrupted; nothing of the unfinished run was kept\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("between", "raised"), [(0.0, 1), (10.0, 2)])
def test_a_signal_sent_twice(monkeypatch, own_handlers, between, raised):
    """GNU timeout sends it to the process and to its group: the second doesn't end the tidying up."""
    times = iter([5.0, 5.0 + between, 5.0 + between])
    monkeypatch.setattr(signals.time, "monotonic", lambda: next(times))
    ends = []

    def work():
        for _ in range(2):
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except KeyboardInterrupt:
                ends.append(1)

    with pytest.raises(SystemExit) as end:
        signals.run_command(work, "x")
    assert (end.value.code, len(ends)) == (130, raised)


EXEC = """
import os, signal
from simlab.signals import run_command
text = "os.kill(os.getpid(), signal.SIG{name}); [None for _ in range(10**6)]"
run_command(lambda: exec(text, {{"os": os, "signal": signal}}), "nothing was kept")
"""


@pytest.mark.parametrize(("name", "status"), [("TERM", 143), ("INT", 130)])
def test_a_signal_within_an_exec(tmp_path, name, status):
    """As where a dataclass is made: Python would end by SIGINT, also after a SIGTERM."""
    (tmp_path / "kill_itself.py").write_text(EXEC.format(name=name))
    command = [
        sys.executable,
        "-m",
        "kill_itself",
    ]  # as simlab's commands are: a script ends otherwise
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (status, "simlab: interrupted; nothing was kept\n")


def test_a_callback_swallows_a_signal(capfd, own_handlers):
    """Without a traceback, which Python prints of other exceptions there."""

    class Once:
        def __init__(self, ends):
            self.ends = ends

        def __del__(self):
            self.ends()

    def work():
        Once(lambda: os.kill(os.getpid(), signal.SIGTERM))
        Once(lambda: [][0])

    with pytest.raises(SystemExit) as end:
        signals.run_command(work, "x")
    said = capfd.readouterr().err
    assert end.value.code == 143
    assert "KeyboardInterrupt" not in said
    assert said.count("Traceback") == said.count("IndexError") == 1


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_the_reader_goes(tmp_path, unbuffered):
    """``| head -1``: all files are written, and nothing is said."""
    command = [sys.executable, "-m", "simlab.run", *SMALL, "engine=theory", "hydra.run.dir=out"]
    env = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    with subprocess.Popen(
        command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout.readline().startswith(b"olmo2_7b with depth 3")
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0
    assert (tmp_path / "out" / "summary.json").exists()
    assert (tmp_path / "out" / "growth.png").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only some systems have one")
@pytest.mark.parametrize("status", [0, 1, 2])
def test_output_to_a_full_disk(capfd, monkeypatch, own_handlers, status):
    """The work is done; the status is 2 where it would be 0, and one line says why."""
    done = []

    def work():
        print("x" * 100_000)
        done.append(1)
        if status == 2:
            print("another line", file=sys.stderr)
        raise SystemExit(status)

    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit) as end:
            signals.run_command(work, "x")
    assert (end.value.code, done) == (status or 2, [1])
    said = "simlab: the output is incomplete: No space left on device; results are kept\n"
    assert capfd.readouterr().err == (said if status < 2 else "another line\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only some systems have one")
@pytest.mark.parametrize("command", ["__main__", "run", "regress.__main__", "sweep.__main__"])
def test_a_version_to_a_full_disk(capfd, monkeypatch, own_handlers, command):
    """Of every command, as nothing comes before its handlers."""
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        monkeypatch.setattr(sys, "argv", ["simlab", "--version"])
        with pytest.raises(SystemExit) as end:
            importlib.import_module(f"simlab.{command}").main()
    assert end.value.code == 2
    assert len(capfd.readouterr().err.splitlines()) == 1


OUT = {
    "Python": MemoryError(),
    "torch": RuntimeError(
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
    ),
    "C++": RuntimeError("std::bad_alloc"),
    "threads": RuntimeError("can't start new thread"),
    "the loader": ImportError("libtorch.so: failed to map segment from shared object"),
    "CUDA": RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
}


@pytest.mark.parametrize("who", OUT)
@pytest.mark.parametrize("where", ["experiment.prepare", "experiment.measure"])
def test_out_of_memory_is_one_line(tmp_path, monkeypatch, who, where):
    def fails(*_):
        raise OUT[who]

    monkeypatch.setattr(f"simlab.{where}", fails)
    done = in_process(*SMALL, cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"simlab: out of memory ({type(OUT[who]).__name__}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere ulimit -v does nothing")
@pytest.mark.parametrize(
    ("addresses", "command", "needs"),
    [
        (900_000, "run model=small depth=1", "torch .* 1.05"),
        (900_000, "run -m model=small depth=1,2", "torch .* 1.05"),
        (400_000, "regress", "pandas .* 0.65"),
    ],
)
def test_a_real_ulimit(tmp_path, addresses, command, needs):
    """Of addresses, in kB: one line, and no crash of a package that is being imported."""
    command = f"ulimit -v {addresses}; OMP_NUM_THREADS=1 exec {sys.executable} -m simlab.{command}"
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert re.match(f"simlab: ulimit -v: {needs} GB", done.stderr)
    assert list(tmp_path.iterdir()) == []
