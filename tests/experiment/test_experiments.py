"""Every file in conf/experiment: composed whole, run at reduced size."""

from functools import cache

import pandas as pd
import pytest
from conftest import in_process
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode

from simlab.config import CONF_DIR
from simlab.config.validate import compose, options
from simlab.schemes.placement import PLACEMENTS
from simlab.sweep.plan import plan_sweep

TINY = ["width=32", "heads=2", "kv_heads=2", "d_ff=64"]
# Of each: its swept columns, its number of jobs, and overrides that make it small.
EXPERIMENTS = {
    "issue797": (
        ["model", "norm_placement"], 6,
        ["model=small,olmo2_1b", *TINY, "depth=7", "vocab_size=61"],
    ),
    "olmo2_fig5": (["recipe", "width"], 10, ["width=64,128", "depth=2"]),
    "olmo2_fig6": (["recipe", "width"], 18, ["width=64,128", "depth=2"]),
    "norm_zoo": (
        ["norm_placement"], len(PLACEMENTS) + 7, [*TINY, "depth=7", "norm=reordered,swin_renorm,post"],
    ),
    "depth_by_std": (
        ["depth", "init.std", "norm_placement"], 32, [*TINY, "depth=1,2", "init.std=0.01,0.02"],
    ),
    "coord_check": (["norm_placement", "init", "width"], 24, ["width=32,64", "depth=2"]),
    "swin_every": (["norm.every"], 7, [*TINY, "depth=4", "norm.every=1,2"]),
    "context_length": (
        ["inputs.length", "norm.eps"], 16, [*TINY, "depth=2", "inputs.length=4,8"],
    ),
}  # fmt: skip


@cache
def planned(name):
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config = hydra_compose("config", [f"+experiment={name}"], return_hydra_config=True)
        assert config.hydra.mode == RunMode.MULTIRUN  # no -m is needed
        loader = GlobalHydra.instance().config_loader()
        params = [f"{key}={value}" for key, value in config.hydra.sweeper.params.items()]
        return plan_sweep(loader, "config", [], [*params, f"+experiment={name}"])


def test_every_experiment_is_tested():
    others = {"families"}  # which needs checkpoints: tests/checkpoints/test_survey.py
    assert set(EXPERIMENTS) | others == set(options("experiment"))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_composed(name):
    columns, jobs, _ = EXPERIMENTS[name]
    sweep = planned(name)
    assert list(sweep.swept) == columns
    assert len(sweep.jobs) == jobs
    assert len({job.config for job in sweep.jobs}) == jobs  # no two are the same
    shapes = [job.config.shape for job in sweep.jobs]
    if name == "norm_zoo":
        assert {shape.norm.placement for shape in shapes} == set(PLACEMENTS) - {"custom"}
    if name == "issue797":
        assert {shape.name for shape in shapes} == {"olmo2_7b", "olmo2_13b", "olmo2_32b"}
        assert {shape.norm.every for shape in shapes} == {None, 6}
    if name.startswith("olmo2_fig"):
        for job in sweep.jobs:
            model, init = job.config.shape, job.config.init
            old = job.values["recipe"] == "olmo_0424"
            assert model.norm.placement == ("pre" if old else "reordered")
            assert (init.rule, init.std) == (("mitchell", None) if old else ("normal", 0.02))
            assert (model.norm.type, model.qk_norm) == (
                ("layer", "none") if old else ("rms", "full")
            )
            assert job.config.inputs.batch == 50
            assert job.config.gradients
            assert (model.heads, model.d_ff) == (model.width // 64, 4 * model.width)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name != "olmo2_fig5"])
def test_run_at_reduced_size(tmp_path, figure_names, name):
    """olmo2_fig5 is olmo2_fig6 at other widths."""
    columns, _, small = EXPERIMENTS[name]
    small = [*small, "seeds=2", "device=cpu", "hydra.sweep.dir=out", "++vocab_size=61"]
    if name != "context_length":
        small += ["inputs.length=5", "inputs.batch=2"]
    done = in_process(f"+experiment={name}", *small, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    frame = pd.read_parquet(tmp_path / "out" / "sweep.parquet")
    assert set(columns) <= set(frame.columns)
    wanted = {"growth"}
    if "width" in columns:
        wanted |= {"statistics", "lambda"}
    if name == "depth_by_std":
        wanted |= {"heatmap"}
    assert set(figure_names) >= wanted


def test_recipes_are_whole_configs():
    for name in options("recipe"):
        assert compose([f"+recipe={name}", "model=small"]).shape.width == 512
