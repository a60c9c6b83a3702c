"""Arguments that Hydra can't read: one line that says how to write them."""

import shlex
import subprocess

import pytest
from conftest import in_process
from hydra.core.override_parser.overrides_parser import OverridesParser

from simlab.config.command_line import as_text, refuse_options

QUOTES = "has characters that need quotes; write "
LINES = {
    ("--depth=8",): "--depth=8: write depth=8, without dashes",
    ("--depth", "8"): "--depth: write depth=8, without dashes",
    ("-depth=8",): "-depth=8: write depth=8, without dashes",
    ("--source.path", "my dir"): "--source.path: write 'source.path=my dir', without dashes",
    ("--dry-run",): "--dry-run: write dry_run=true, without dashes",
    ("--norm", "depth=8"): "--norm: write norm=VALUE, without dashes",
    ("--experiment", "issue797"): "--experiment: write +experiment=issue797, without dashes",
    ("--batch-size=8",): "no such option, and keys are written key=value; did you mean inputs.batch?",
    ("--mutlirun",): "no such option, and keys are written key=value; did you mean --multirun?",
    ("--lr=3",): "--lr=3: no such option, and keys are written key=value; see --help",
    ("depth=8,16",): "depth=8,16: several values need -m: python -m simlab.run -m depth=8,16",
    ("init.std=0,02",): "simlab.run -m init.std=0,02; a number has a point: init.std=0.02",
    ("depth", "8"): "depth: not of the form key=value, as depth=VALUE",
    ("model=a/b",): "; a checkpoint is source=checkpoint source.path=a/b",
    ("seeds=1,2",): "simlab.run -m seeds=1,2; a list is seeds=[1,2]",
    ("seed=range(1,3)",): "several values need -m: python -m simlab.run -m 'seed=range(1,3)'",
    ("inputs.prompt=a, b",): "; a text with commas is 'inputs.prompt=\"a, b\"'",
    ("source.path=epoch=1",): f"source.path=epoch=1: {QUOTES}'source.path=\"epoch=1\"'",
    ("source.path=été",): f"source.path=été: {QUOTES}'source.path=\"été\"'",
    ("source.path=it's",): f"{QUOTES}\"source.path=\\\"it's\\\"\"",
    ("-m", "source.path=été,b"): f"source.path=été,b: {QUOTES}'source.path=\"été\",\"b\"'",
    ("inputs.prompt=caf\udce9",): "not UTF-8 text (byte 0xe9); convert it to UTF-8",
    ("depth=[8",): "depth=[8: its brackets can't be read; a list is [1,2]",
    ("depth=foo(3)",): "depth=foo(3): its brackets can't be read",
    ("depth", "=8"): "=8: not of the form key=value, without spaces",
    ("depth==8",): "depth==8: not of the form key=value",
    ("+experiment=3",): "+experiment=3: allowed: context_length, ",
    ("hydra/launcher=3",): "hydra/launcher=3: allowed: basic, joblib, ",
}  # fmt: skip


def test_no_arguments():
    refuse_options([])
    refuse_options(["depth=8"])


@pytest.mark.parametrize("args", LINES)
def test_one_line(tmp_path, args):
    done = in_process(*args, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert LINES[args] in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_is_to_be_written_is_read_as_it_was_meant():
    parser = OverridesParser.create()
    for text in (
        "été", "a=b", "50%_done#1", "my folder/it's", 'say "x"', "it's \"x\"", "C:\\x=1\\", "\\'",
        '\\"', "\\\\\"'\\", "a,b", " a ", "$HOME `x` !", "[1", "日本/語",
    ):  # fmt: skip
        (given,) = shlex.split(as_text("source.path", text))
        assert parser.parse_override(given).value() == text
    (given,) = shlex.split(as_text("source.path", "a=b", "c'd"))
    swept = parser.parse_override(given)
    assert list(swept.sweep_string_iterator()) == ['"a=b"', '"c\'d"']


def test_line_breaks_as_bash_takes_them():
    text = "one\ntwo\t'x' \\ \"é\""
    given = subprocess.run(
        ["bash", "-c", f"printf %s {as_text('inputs.prompt', text)}"],
        capture_output=True, check=True, env={"LC_ALL": "C.UTF-8"},
    ).stdout.decode()  # fmt: skip
    assert OverridesParser.create().parse_override(given).value() == text
