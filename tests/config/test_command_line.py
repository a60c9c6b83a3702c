"""Arguments that Hydra can't read: one line that says how to write them."""

import re
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


OWN_FILES = {  # in DIR/norm of -cd DIR
    ("mine.yaml", b"update: x + F(x): 3"): "mapping values are not allowed here",
    ("mine.yaml", "# \xe0 moi\nupdate: x".encode("latin-1")): "mine.yaml: not UTF-8 text (byte 2)",
    ("mine.yaml", b"defaults: custom"): "mine.yaml: defaults=custom: allowed: a list, as [custom]",
    ("mine.yaml", b"defaults: [kustom]"): "norm=kustom: allowed: attn_res, ",
    ("pre.yaml", b"defaults: [custom]"): "pre.yaml: norm=pre is simlab's own, and would be taken",
}


@pytest.mark.parametrize(("name", "content"), OWN_FILES)
def test_mistakes_in_ones_own_choices(tmp_path, name, content):
    (tmp_path / "mine" / "norm").mkdir(parents=True)
    (tmp_path / "mine" / "norm" / name).write_bytes(content)
    done = in_process("-cd", "mine", "norm=mine", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert OWN_FILES[name, content] in done.stderr


def test_a_formula_beside_other_placements(tmp_path):
    """Its keys, which the others haven't, are those of a choice of one's own."""
    sweep = ["-m", "model=small", "norm=pre,custom", "dry_run=true"]
    done = in_process(*sweep, 'norm.update="x + F(x)"', cwd=tmp_path)
    assert done.returncode == 2
    assert "norm=NAME,… with its keys in DIR/norm/NAME.yaml, and -cd DIR" in done.stderr
    (tmp_path / "mine" / "norm").mkdir(parents=True)
    text = "defaults: [custom]\nupdate: x + F(N(x))/sqrt(l)\n"
    (tmp_path / "mine" / "norm" / "mine.yaml").write_text(text)
    sweep[2] = "norm=pre,mine"
    done = in_process("-cd", "mine", *sweep, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"0  pre .*\n +1  mine ", done.stdout)


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
