"""The fixture growth_regression, in the test suite of the example in docs/gate.md."""

import re
from pathlib import Path

import pytest

# Imported here and not used: an inner session takes all that it imported out of sys.modules, so each of
# them would import these large modules again. F401 is about the last of several.
import transformers.models.qwen3.modeling_qwen3  # noqa: F401

import simlab.config.validate
import simlab.experiment
import simlab.measurement.model_probe
import simlab.regress.cases
import simlab.regress.report  # noqa: F401

pytestmark = pytest.mark.filterwarnings("default")  # of the inner sessions' plugins


@pytest.fixture
def example():
    page = (Path(__file__).parents[2] / "docs" / "gate.md").read_text(encoding="utf-8")
    section = page.split("## In your own test suite\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"```python\n(.*?)```", section, flags=re.S)
    return block


@pytest.fixture
def suite(pytester, example, monkeypatch):
    """Runs the example's tests: (outcomes, output)."""
    path = pytester.makepyfile(test_growth=example)

    def run(*args, old="", new=""):
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
        result = pytester.runpytest_inprocess("-q", "-p", "no:cacheprovider", *args)
        return result.parseoutcomes(), result.stdout.str()

    return run


def test_page_example(suite, pytester):
    outcomes, said = suite()
    assert outcomes == {"failed": 2}
    assert "recorded for the first time, look at it and commit it" in said
    folder = pytester.path / "test_growth"
    files = sorted(path.name for path in folder.iterdir())
    assert files == ["test_same_law.csv", "test_same_numbers.csv"]
    before = [(folder / name).read_bytes() for name in files]
    assert suite()[0] == {"passed": 2}
    # Other numbers of the same law: only the exact gate minds.
    outcomes, said = suite(old="torch.manual_seed(seed)", new="torch.manual_seed(seed + 1000)")
    assert outcomes == {"passed": 1, "failed": 1}
    assert "FAILED test_growth.py::test_same_numbers" in said
    # Another law: both do, and say where.
    changed = "num_hidden_layers=3, rms_norm_eps=1e-2"
    outcomes, said = suite(old="num_hidden_layers=3", new=changed)
    assert outcomes == {"failed": 2}
    said = " ".join(said.split())
    assert "first at sublayer 1, the attention of block 1" in said
    assert "standard errors" in said
    figure = Path(re.findall(r"figure: (\S+\.png)", said)[0])
    assert figure.stat().st_size > 10_000
    assert [(folder / name).read_bytes() for name in files] == before
    # Recorded anew, which fails once more.
    outcomes, said = suite("--growth-update")
    assert outcomes == {"failed": 2}
    assert "recorded anew" in said
    assert [(folder / name).read_bytes() for name in files] != before


SMALL = """
import pandas as pd
import pytest
import torch
import simlab

CONFIG = simlab.compose(["model=small", "depth=2", "width=32", "heads=2", "kv_heads=2", "d_ff=64",
                         "vocab_size=64", "device=cpu"])

def model(seed=0):
    return simlab.build_model(CONFIG, seed=seed)

IDS = torch.arange(16)[None]
FAILED = pytest.fail.Exception
"""


def test_mistakes_and_names(pytester):
    pytester.makepyfile(
        test_own=SMALL
        + """
def test_few(growth_regression):
    rows = [simlab.probe(model(seed), IDS, seed=seed).rows() for seed in range(3)]
    with pytest.raises(FAILED, match="these rows have 3 seeds of 1 curves"):
        growth_regression.check_rows(pd.concat(rows), gate="statistical")

def test_gate(growth_regression):
    with pytest.raises(FAILED, match="gate=law: allowed: exact, statistical"):
        growth_regression.check_rows(simlab.probe(model(), IDS).rows(), gate="law")

def test_dtype(growth_regression):
    with pytest.raises(FAILED, match="dtype=int8: allowed: float64"):
        growth_regression.check_rows(simlab.probe(model(), IDS).rows(), dtype="int8")

def test_not_finite(growth_regression):
    broken = model()
    with torch.no_grad():
        broken.embedding.weight.fill_(torch.nan)
    with pytest.raises(FAILED, match="isn't finite from sublayer 0 on.*neither recorded") as failed:
        growth_regression.check(broken, IDS)
    assert failed.value.__suppress_context__  # else pytest prints the message twice
    rows = simlab.probe(model(), IDS).rows()
    with pytest.raises(FAILED, match="not recorded, .*isn't finite from sublayer 0 on; only finite"):
        growth_regression.check_rows(rows.assign(norm=float("nan")), basename="nan")
    with pytest.raises(FAILED, match="not recorded, they have no numbers"):
        nothing = rows.assign(kurtosis=float("nan"))
        growth_regression.check_rows(nothing, quantities=["kurtosis"], basename="empty")
    with pytest.raises(FAILED, match="basename=nnn.*at most 200 bytes"):
        growth_regression.check(model(), IDS, basename="n" * 300)

def test_cut(growth_regression):
    # What is left of a curve that isn't finite looks well: it is neither recorded nor as recorded.
    def rows(seed, break_it=True):
        broken = model(seed)
        if break_it:
            torch.nn.init.constant_(broken.blocks[0].mlp.sublayer.down_proj.weight, torch.nan)
        return simlab.probe(broken, IDS, seed=seed).rows()

    cut = [rows(seed) for seed in range(9)]
    whole = [rows(seed, False) for seed in range(9)]
    cases = {"exact": cut[:1], "statistical": cut, "some": [*whole[:8], cut[8]]}
    for update in (False, True):
        growth_regression.update = update
        for name, given in cases.items():
            gate = "exact" if name == "exact" else "statistical"
            basename = f"{name}{update}"
            with pytest.raises(FAILED, match="isn't finite from sublayer 2 on"):
                growth_regression.check_rows(pd.concat(given), gate, basename=basename)
    # As an earlier version recorded it.
    growth_regression.update = False
    bare = cut[0].copy()
    bare.attrs.clear()
    with pytest.raises(FAILED, match="recorded for the first time"):
        growth_regression.check_rows(bare, basename="early")
    growth_regression.here.clear()
    with pytest.raises(FAILED, match="isn't finite from sublayer 2 on"):
        growth_regression.check_rows(cut[0], basename="early")
    (growth_regression.folder / "early.csv").unlink()

@pytest.mark.parametrize("number", [0, 1], ids=["x" * 300, "x" * 301])
def test_long(growth_regression, number):
    growth_regression.check(model(), IDS, quantities=["norm"])

class NoParameters(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Identity() for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

def test_no_parameters(growth_regression):
    with pytest.raises(FAILED, match="^growth_regression: [^\\n]*$"):
        growth_regression.check(NoParameters(), torch.ones(1, 4, 8))

@pytest.mark.parametrize("seed", [0, 1])
def test_named(growth_regression, seed):
    growth_regression.check(model(seed), IDS, quantities=["norm", "kurtosis"])

def test_basename(growth_regression):
    growth_regression.check(model().bfloat16(), IDS, basename="other")
"""
    )
    result = pytester.runpytest_inprocess("-q")
    result.assert_outcomes(passed=6, failed=5)
    folder = pytester.path / "test_own"
    names = sorted(path.name for path in folder.iterdir())
    long = [name for name in names if name.startswith("test_long_xxx")]
    assert [len(name) for name in long] == [203, 203], "199 bytes and .csv"
    assert [n for n in names if n not in long] == [
        "other.csv", "test_named_0_.csv", "test_named_1_.csv"
    ]  # fmt: skip
    assert "# dtype: bfloat16" in (folder / "other.csv").read_text()
    header = (folder / "test_named_0_.csv").read_text().splitlines()[2]
    assert header == "curve,seed,sublayer,block,kind,norm,kurtosis"
    pytester.runpytest_inprocess("-q").assert_outcomes(passed=11)


def test_records_that_do_not_match(pytester):
    """A record of more curves, of another dtype, and names that two checks would share."""
    path = pytester.makepyfile(
        test_own=SMALL
        + """
SEEDS, DTYPE = 2, torch.float32

def test_seeds(growth_regression):
    rows = [simlab.probe(model(seed), IDS, seed=seed).rows() for seed in range(SEEDS)]
    growth_regression.check_rows(pd.concat(rows))

def test_dtype(growth_regression):
    growth_regression.check(model().to(DTYPE), IDS)

@pytest.mark.parametrize("name", ["a/b", "a-b"])
def test_names(growth_regression, name):
    growth_regression.check(model(), IDS)

class TestA:
    def test_x(self, growth_regression):
        growth_regression.check(model(), IDS)
        growth_regression.check(model(1), IDS, basename="second")

class TestB:
    def test_x(self, growth_regression):
        growth_regression.check(model(1), IDS)

def test_twice(growth_regression):
    growth_regression.check(model(), IDS, quantities=["norm"])
    growth_regression.check(model(), IDS, quantities=["norm"])

def test_elsewhere(growth_regression):
    growth_regression.check(model(), IDS, basename="../evil")
"""
    )
    for _ in range(3):
        result = pytester.runpytest_inprocess("-q")
    result.assert_outcomes(passed=5, failed=3)
    said = result.stdout.str()
    assert said.count("is the curve of another check: give this one a basename") >= 2
    assert "basename=../evil: allowed: letters" in said
    assert not (pytester.path / "evil.csv").exists()
    text = path.read_text().replace("2, torch.float32", "1, torch.bfloat16")
    path.write_text(text)
    said = pytester.runpytest_inprocess("-q").stdout.str()
    assert "model of seed 1 is recorded and wasn't measured" in said
    assert "was recorded with float32" in said


def test_plugin_imports_nothing_heavy(pytester):
    """It is imported by every pytest session of its environment."""
    pytester.makepyfile(
        """
        import sys
        def test_light():
            assert "simlab.pytest_plugin" in sys.modules
            assert not {"torch", "pandas", "hydra"} & set(sys.modules)
        """
    )
    pytester.runpytest_subprocess("-q", "-p", "no:hydra_pytest").assert_outcomes(passed=1)
