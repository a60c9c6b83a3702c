"""CONTRIBUTING.md's recipes, followed to the letter."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny

from simlab.budget.memory import needed
from simlab.config import CONF_DIR, MLP_NAMES
from simlab.experiment import run
from simlab.model import mlp
from simlab.model.describe import describe
from simlab.schemes import placement

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def recipe(title):
    """A section of CONTRIBUTING.md."""
    return re.split(r"^##+ ", TEXT.split(f"# {title}\n")[1], flags=re.MULTILINE)[0]


def block(text, language):
    """The section's only code block in a language."""
    (code,) = re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)
    return code


def files(text):
    """The paths that a section names."""
    return set(re.findall(r"`([\w/]+\.(?:py|yaml|md))`", text))


PLACEMENT = recipe("Add a norm placement")


@pytest.fixture
def followed(monkeypatch, tmp_path):
    """The recipe's class, registered, and its file in a copy of conf/."""
    names = vars(placement).copy()
    exec(block(PLACEMENT, "python"), names)
    monkeypatch.setitem(placement.PLACEMENTS, "deepnorm", names["DeepNorm"])
    shutil.copytree(CONF_DIR, tmp_path / "conf")
    (tmp_path / "conf" / "norm" / "deepnorm.yaml").write_text(block(PLACEMENT, "yaml"))
    monkeypatch.setattr("simlab.config.validate.CONF_DIR", tmp_path / "conf")


@pytest.mark.usefixtures("followed")
@pytest.mark.parametrize("engine", ["dense", "weightless"])
def test_placement_recipe_runs(engine):
    result = run(
        tiny("norm=deepnorm", "norm.eps=1e-9", f"engine={engine}", "seeds=2", "gradients=true")
    )
    rows = result.curve[result.curve["sublayer"] > 0]
    assert result.config.shape.norm.placement == "deepnorm"
    np.testing.assert_allclose(rows["mean_square"], 1, rtol=1e-4)  # the stream is normed
    np.testing.assert_allclose(rows["mean_square"], rows["law_additive"], rtol=1e-5)
    assert (rows["gradient_norm"] > 0).all()


def test_recipe_files_exist():
    for path in files(PLACEMENT):
        assert (ROOT / path.replace("NAME", "mix_ln")).is_file(), path


@pytest.mark.parametrize(
    ("name", "mentions"),
    [("mix_ln", r"mix_ln|MixLN|\bfraction:|\"fraction\""), ("pre_post", "pre_post|PrePost")],
)
def test_recipe_names_every_file(name, mentions):
    """Of simlab/ and conf/, these files alone know Mix-LN, and a placement that differs by sublayer."""
    paths = [path for folder in ("simlab", "conf") for path in (ROOT / folder).rglob("*.*")]
    paths = [path for path in paths if path.suffix in (".py", ".yaml")]
    used = {
        path.relative_to(ROOT).as_posix().replace(name, "NAME")
        for path in paths
        if re.search(mentions, path.read_text(encoding="utf-8"))
    }
    assert used <= files(PLACEMENT)
    assert used > {"simlab/schemes/placement.py", "conf/norm/NAME.yaml"}
    for path in ("tests/model/test_placement.py", "tests/schemes/test_schemes.py"):
        assert name in (ROOT / path).read_text(encoding="utf-8"), path


@pytest.mark.parametrize("engine", ["dense", "weightless"])
def test_mlp_recipe_runs(monkeypatch, engine):
    text = recipe("Add an MLP")
    names = vars(mlp).copy()
    exec(block(text, "python"), names)
    monkeypatch.setitem(mlp.MLPS, "relu", names["PlainReLU"])
    monkeypatch.setattr("simlab.config.validate.MLP_NAMES", (*MLP_NAMES, "relu"))
    asked = ["model.mlp=relu", "model.bias=true", "gradients=true", "seeds=2"]
    config = tiny(*asked, f"engine={engine}")
    result = run(config)
    assert (result.curve["gradient_norm"] > 0).all()
    assert describe(config.shape).groups[2:] == [(48, [80]), (80, [48])]
    assert needed(config, 2) > 0
    for path in files(text):
        assert (ROOT / path).is_file(), path
