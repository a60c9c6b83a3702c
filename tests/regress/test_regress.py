"""``python -m simlab.regress`` as it is used, on a small case; simlab's own cases are run by CI."""

import shlex
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import pandas as pd
import pytest
import yaml
from conftest import in_process

from simlab.config import ConfigError
from simlab.regress import __main__ as regress
from simlab.regress.cases import read_baseline, read_case, read_cases
from simlab.regress.gates import QUANTITIES, ROW_KEYS
from simlab.schemes.plain import Reordered

OWN = Path(__file__).parents[1] / "baselines"
CASE = """\
description: three small blocks
overrides: [model=small, depth=3, width=32, heads=2, kv_heads=2, d_ff=64, vocab_size=64, init.std=0.3,
            inputs.batch=1, inputs.length=8, device=cpu, engine=dense, seeds=10]
gates: [exact, statistical, law]
"""


@pytest.fixture
def cases(tmp_path, monkeypatch):
    """A folder with a case, as the current one."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "tests" / "baselines"
    folder.mkdir(parents=True)
    (folder / "small.yaml").write_text(CASE)
    return folder


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """What the command records for CASE: a file, made once."""
    folder = tmp_path_factory.mktemp("once") / "tests" / "baselines"
    folder.mkdir(parents=True)
    (folder / "small.yaml").write_text(CASE)
    update = ["--update", "small", "--reason", "to begin with"]
    done = in_process(*update, cwd=folder.parents[1], command="regress")
    assert done.returncode == 0, done.stderr
    return folder / "small.csv"


@pytest.fixture
def recorded(cases, record):
    shutil.copy(record, cases)
    return cases


@pytest.fixture
def command():
    """Exit status, stdout and stderr of the command with these arguments."""

    def call(*args):
        done = in_process(*map(str, args), cwd=Path.cwd(), command="regress")
        return done.returncode, done.stdout, done.stderr

    return call


def wrong(monkeypatch):
    """Branches 10 % too large after the norm."""
    monkeypatch.setattr(
        Reordered, "step", lambda self, x, F, add, norm_out: add(x, 1.1 * norm_out(F(x)))
    )


def test_record_and_pass(recorded, command):
    status, out, err = command()
    assert (status, err) == (0, "")
    line = out.splitlines()[0]
    assert line.startswith("pass  small")
    assert all(gate in line for gate in ("exact", "statistical", "law"))
    assert "1 case: all pass" in out
    assert all(len(line) <= 80 for line in out.splitlines())
    assert not Path("outputs").exists()


def test_recorded_file(recorded, command):
    path = recorded / "small.csv"
    before = path.read_bytes()
    lines = before.decode().splitlines()
    assert lines[:2] == ["# case: small", "# reason: to begin with"]
    about = read_baseline(path, QUANTITIES).about
    assert (about["engine"], about["device"], about["dtype"]) == ("dense", "cpu", "float32")
    frame = pd.read_csv(path, comment="#")
    assert list(frame) == [*ROW_KEYS, *QUANTITIES]
    assert len(frame) == 10 * 7
    status, out, _ = command("--update", "small", "--reason", "to begin with")
    assert status == 0
    assert "norm: as before" in out
    assert path.read_bytes() == before


def test_another_folder_and_a_long_name(tmp_path, command, monkeypatch):
    """The command that is advised works as it stands, and takes the longest names of a file."""
    monkeypatch.chdir(tmp_path)
    name = "n" * 250
    Path("my cases").mkdir()
    case = CASE.replace("seeds=10", "seeds=1").replace("[exact, statistical, law]", "[exact]")
    Path("my cases", f"{name}.yaml").write_text(case)
    status, out, err = command("--baselines", "my cases", "--update", name, "--reason", "why")
    assert (status, err) == (0, "")
    advice = out.splitlines()[-1].removeprefix(
        "to hold it against a new run: python -m simlab.regress "
    )
    assert command(*shlex.split(advice))[0] == 0


def test_a_mistake_fails(recorded, command, monkeypatch):
    wrong(monkeypatch)
    status, out, _ = command("--svg")
    assert status == 1
    assert out.startswith("FAIL  small")
    said = " ".join(out.split())
    assert "first at sublayer 1, the attention of block 1" in said
    assert "standard errors" in said
    assert "to blame: norm" in said
    assert Path("outputs/regress/small.png").stat().st_size > 10_000
    assert Path("outputs/regress/small.svg").exists()
    assert "1 FAIL (small)" in out


def test_only_update_records(recorded, command, monkeypatch):
    before = {path: path.read_bytes() for path in recorded.iterdir()}
    wrong(monkeypatch)
    command()
    command("--list")
    assert {path: path.read_bytes() for path in recorded.iterdir()} == before
    status, out, _ = command("--update", "small", "--reason", "larger branches")
    assert status == 0
    assert "norm: changed by up to" in out
    assert "# reason: larger branches\n" in (recorded / "small.csv").read_text()


def test_a_changed_number_in_the_file(recorded, command):
    """Of the recorded curve that ``exact`` draws again."""
    path = recorded / "small.csv"
    lines = path.read_text().splitlines()
    row = next(i for i, line in enumerate(lines) if line.startswith("random,0,4,"))
    cells = lines[row].split(",")
    cells[5] = str(float(cells[5]) * 1.001)
    path.write_text("\n".join([*lines[:row], ",".join(cells), *lines[row + 1 :]]) + "\n")
    status, out, _ = command()
    assert status == 1
    assert "sublayer 4, the mlp of block 2: norm is" in " ".join(out.split())


def test_list(cases, command):
    assert "not recorded yet" in command("--list")[1]
    command("--update", "small", "--reason", "to begin with")
    out = command("--list", "s*", "small")[1]
    assert out.count("gates") == 1
    assert "small: three small blocks" in out
    assert "gates exact, statistical, law" in out
    assert "recorded: to begin with" in out


def test_page_and_junit(recorded, command, monkeypatch):
    status, _, _ = command("--html", "page", "--junit", "ci/junit.xml")
    assert status == 0
    page = Path("page/index.html").read_text()
    assert 'src="small.png"' in page
    assert Path("page/small.png").exists()
    suite = ET.parse("ci/junit.xml").getroot().find("testsuite")
    assert (suite.get("tests"), suite.get("failures")) == ("3", "0")
    wrong(monkeypatch)
    assert command("--html", "page", "--junit", "ci/junit.xml")[0] == 1
    assert "to blame: norm" in Path("page/index.html").read_text()
    suite = ET.parse("ci/junit.xml").getroot().find("testsuite")
    assert suite.get("failures") == "3"
    names = [test.get("name") for test in suite if test.find("failure") is not None]
    assert names == ["small[exact]", "small[statistical]", "small[law]"]
    assert "blame: norm" in suite[0].find("failure").text


def test_the_workflow_for_github_actions(recorded, command):
    """It is YAML of the shape that GitHub reads, its command runs, and what it uploads is written."""
    workflow = yaml.load(
        (OWN.parents[1] / "docs" / "growth_curves.yml").read_text(), Loader=yaml.BaseLoader
    )
    assert set(workflow) == {
        "name",
        "on",
        "permissions",
        "jobs",
    }  # the safe loader reads on as True
    (job,) = workflow["jobs"].values()
    checkout, python, install, check, upload = job["steps"]
    assert [step["uses"].partition("@")[0] for step in (checkout, python, upload)] == [
        "actions/checkout", "actions/setup-python", "actions/upload-artifact",
    ]  # fmt: skip
    assert install["run"].startswith("pip install ")
    args = shlex.split(check["run"])
    assert args[:3] == ["python", "-m", "simlab.regress"]
    status, _, err = command(*args[3:])
    assert (status, err) == (0, "")
    written = {path.name for path in Path(upload["with"]["path"]).iterdir()}
    assert written >= {"index.html", "report.html", "small.png", "junit.xml"}
    assert "cancelled()" in upload["if"]  # so the page of a failure is kept, too


def test_the_page_escapes(recorded, command):
    case = recorded / "small.yaml"
    case.write_text(CASE.replace("three small blocks", "<script>alert(1)</script>"))
    command("--html", "page")
    assert "<script>" not in Path("page/index.html").read_text()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["smal"], "smal: no such case; allowed: small; did you mean small?"),
        (["sm*", "bi*"], "bi*: no case matches; allowed: small"),
        (["--update", "smal", "--reason", "why"], "did you mean small?"),
        (["--update", "s*", "--reason", "why"], "--update s*: give one case's name"),
        (["--baselines", "nowhere"], "nowhere: no such folder"),
        (["--baselines", "."], "has no case"),
    ],
)
def test_mistakes_in_the_command(recorded, command, args, said):
    status, _, err = command(*args)
    assert status == 2
    assert said in err
    assert len(err.splitlines()) == 1


def test_the_beginning_of_several_names_is_asked_for_as_a_pattern(recorded):
    (recorded / "small2.yaml").write_text(CASE)
    with pytest.raises(ConfigError, match=r"^sm: no such case; .*; did you mean 'sm\*'\?$"):
        regress.choose_cases(read_cases(recorded), ["sm"])


@pytest.mark.parametrize(
    "args", [["--update", "small"], ["--reason", "why"], ["--update", "small", "--reason", " "],
             ["--update", "small", "--reason", "why", "small"]]
)  # fmt: skip
def test_recording_needs_a_reason(cases, command, args):
    status, _, err = command(*args)
    assert status == 2
    assert "--update NAME" in err
    assert not (cases / "small.csv").exists()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("seeds=10", "seeds=6", "small: seeds=6: gate law needs at least 10"),
        ("seeds=10", "source=demo", "source=demo it is read from the checkpoint"),
        ("seeds=10", "sees=9", "small: sees=9: no such key; did you mean seeds?"),
        ("exact,", "exct,", "gates=exct: allowed: exact, statistical, law, theory; did you mean ex"),
        ("gates:", "gate:", "a case has no such key; it has description, overrides, gates"),
        ("[exact, statistical, law]", "exact", "allowed: a list of texts"),
        ("[exact, statistical, law]", "[exact, exact]", "something is in it twice"),
        ("[exact, statistical, law]", "[statistical]", None),
        ("gates:", "gates: [law]\ngates:", "the key 'gates' is there twice"),
        ("[exact,", "[", "small: seeds=10: gate law needs at least 11"),
        ("gates: [", "gates: [[", "not YAML"),
        ("three small blocks", "2020-13-45", None),
        ("three small blocks", "!!python/name:os.system x", "python/name:os.system is not allowed"),
        ("description:", "<<: {gates: [law]}\ndescription:", "a case has no such key"),
        ("[exact, statistical, law]", "", "gates=null: allowed: a list of texts"),
        ("gates:", "gates: " + "[" * 1500, "not YAML"),
        ("exact, statistical, law", "*b", "not YAML"),
        ("gates:", "quantities: [seed]\ngates:", "quantities=seed: isn't measured"),
        ("device=cpu", "device=cuda:77", "small: device=cuda:77: not on this machine"),
        ("seeds=9]".replace("9", "10"), "'seeds=[99999999999999999999999,1]']", "seeds="),
        ("gates:", "quantities: [nrom]\ngates:", "quantities=nrom: isn't measured; did you mean norm?"),
    ],
)  # fmt: skip
def test_mistakes_in_a_case(cases, command, old, new, said):
    (cases / "small.yaml").write_text(CASE.replace(old, new))
    status, _, err = command("--update", "small", "--reason", "why")
    assert status == (0 if said is None else 2), err
    if said is not None:
        assert said in err
        assert len(err.splitlines()) == 1
        assert not (cases / "small.csv").exists()


def test_not_recorded(cases, command):
    status, _, err = command()
    assert status == 2
    assert "small.csv: not recorded yet" in err


def test_other_overrides_than_recorded(recorded, command):
    (recorded / "small.yaml").write_text(CASE.replace("depth=3", "depth=4"))
    status, _, err = command()
    assert status == 2
    assert "recorded with other overrides" in err


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("norm,", "nrom,", 1),
        lambda text: text[: len(text) // 2],
        lambda text: text.replace("random,4,", "random,4000,", 1),
        lambda text: text.replace("attention", "mlp", 1),
        lambda text: "",
        lambda text: text.replace("random,0,", "random,77,"),
        lambda text: "\n".join(line for line in text.splitlines() if ",0,0," not in line),
        lambda text: "\n".join(line for line in text.splitlines() if "random,0," not in line),
        lambda text: text.replace("random,9,", "random,99999999999999999999999,"),
        lambda text: text.replace(text.splitlines()[-1].split(",")[5], "inf"),
        lambda text: text.replace("random,0,1,0,attention,", "random,0,1,0,attention,many", 1),
    ],
)
def test_broken_records(recorded, command, change):
    path = recorded / "small.csv"
    path.write_text(change(path.read_text()))
    status, _, err = command()
    assert status == 2
    assert len(err.splitlines()) == 1
    assert "small" in err


def test_an_overflow_is_not_recorded(cases, command):
    text = CASE.replace("seeds=10", "seeds=10, dtype=float16, init.std=1000, norm=none")
    (cases / "small.yaml").write_text(text.replace("exact, statistical, law", "exact"))
    status, _, err = command("--update", "small", "--reason", "why")
    assert status == 2
    assert "overflows" in err
    assert not (cases / "small.csv").exists()


def test_another_engine_is_no_exact_match(recorded, command):
    path = recorded / "small.csv"
    path.write_text(path.read_text().replace("# engine: dense", "# engine: weightless"))
    status, out, _ = command()
    assert status == 1
    assert "recorded with engine weightless, run with dense" in " ".join(out.split())


def test_own_baselines_are_complete():
    """CI runs them (make regress): here they need only be whole, over the presets that it is about."""
    cases = {case.name: case for case in read_cases(OWN)}
    sizes = ("1b", "7b", "13b", "32b")
    names = [f"olmo2_{m}_{n}" for m in sizes for n in ("reordered", "swin_renorm")]
    assert {*names, "demo"} <= set(cases)
    for case in cases.values():
        regress.to_check(case, regress.configure(case), 1e-3 / len(cases))
        if not case.recorded:
            assert not case.curves.exists()
            continue
        baseline = read_baseline(case.curves, case.quantities)
        assert baseline.about["overrides"] == " ".join(case.overrides)


def test_endless_values_are_not_printed(cases, command):
    bomb = "a0: &a0 [x, x]\n"
    bomb += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10))
    (cases / "small.yaml").write_text("description: no\noverrides: [x=1]\ngates: *a9\n" + bomb)
    assert command()[0] == 2
    (cases / "small.yaml").write_text(bomb.replace("a9:", "gates:") + "overrides: [x=1]\n")
    assert command()[0] == 2


def test_names_of_cases(cases, command):
    (cases / "small.yaml").rename(cases / "a#b.yaml")
    status, _, err = command("--list")
    assert status == 2
    assert "a case's name may have" in err


def test_spaces_in_overrides(cases, command):
    text = CASE.replace("device=cpu", "source=random,  'model.name=\"a  b\"', device=cpu")
    (cases / "small.yaml").write_text(text)
    assert command("--update", "small", "--reason", "why")[0] == 0
    assert command()[0] == 0


def test_junit_is_kept_where_figures_cannot_be(recorded, command, monkeypatch):
    Path("outputs").write_text("in the way")
    wrong(monkeypatch)
    assert command("--junit", "junit.xml")[0] == 2
    assert "to blame: norm" in Path("junit.xml").read_text()
    assert command("--junit", str(recorded))[0] == 2


def test_a_case_needs_no_quantities(cases):
    assert read_case(cases / "small.yaml").quantities == QUANTITIES
    (cases / "small.yaml").write_text(CASE + "quantities: [norm]\n")
    assert read_case(cases / "small.yaml").quantities == ("norm",)


def test_strangers_cases_do_not_execute(cases):
    (cases / "small.yaml").write_text("gates: !!python/object/apply:os.system ['touch ran']\n")
    with pytest.raises(ConfigError, match="not YAML"):
        read_case(cases / "small.yaml")
    assert not Path("ran").exists()
