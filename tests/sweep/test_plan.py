"""A sweep's jobs are what Hydra would make of them."""

import itertools

import pytest
from conftest import INPUTS, SHAPE
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf

from simlab.config import CONF_DIR, ConfigError
from simlab.sweep.plan import plan_sweep

SMALL = [*SHAPE, *INPUTS, "device=cpu", "seeds=1"]


@pytest.fixture
def loader():
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        yield GlobalHydra.instance().config_loader()


SWEEPS = [
    ["depth=range(1,3)", "norm=pre,swin_renorm", "init.std=0.01"],
    ["norm=swin_renorm", "norm.every=1,2", "model.tied=true,false"],
    ["init=normal,mitchell", "init.truncate=null,2"],
    ["model=olmo2_1b,small", "depth=1,2,1", "++inputs.batch=4"],
    ["seeds=[0,1],[2]", "norm=glob(pre*)", "engine=choice(dense,weightless)"],
    ["depth=3", "depth=1,2"],
]


@pytest.mark.parametrize("sweep", SWEEPS, ids=" ".join)
def test_composed_as_hydra_does(loader, sweep):
    overrides = [*SMALL, *sweep]
    planned = plan_sweep(loader, "config", [], overrides)
    parser = OverridesParser.create(config_loader=loader)
    ((*theirs,),) = BasicSweeper.split_arguments(parser.parse_overrides(overrides), None)
    assert [list(job.overrides) for job in planned.jobs] == theirs
    for job in planned.jobs:
        reference = hydra_compose("config", list(job.overrides))
        assert job.composed == OmegaConf.to_container(reference)


def test_numbers_and_columns(loader):
    planned = plan_sweep(
        loader, "config", [], [*SMALL, "depth=1,2", "norm=pre,post", "norm.eps=1e-6,0.1"]
    )
    assert dict(planned.swept) == {
        "depth": (1, 2), "norm_placement": ("pre", "post"), "norm.eps": (1e-6, 0.1),
    }  # fmt: skip
    expected = list(itertools.product((1, 2), ("pre", "post"), (1e-6, 0.1)))
    assert [tuple(job.values.values()) for job in planned.jobs] == expected
    assert [job.number for job in planned.jobs] == list(range(8))
    assert [job.config.shape.norm.eps for job in planned.jobs] == [eps for *_, eps in expected]


def test_mistakes_in_any_job(loader):
    for override, said in (
        ("depth=1,0", "depth=0: allowed"),
        ("depth=glob(*)", "stands for no value"),
        ("heads=6,7", "heads=7: must divide"),
        ("init=normal,true", "init=True: allowed: fan_in"),
        ("seed=range(1000000)", "at most 10000"),
    ):
        with pytest.raises(ConfigError, match=said.replace("(", r"\(")):
            plan_sweep(loader, "config", [], [*SMALL, override])
    with pytest.raises(HydraException):  # only swin_renorm has the key
        plan_sweep(loader, "config", [], [*SMALL, "norm=swin_renorm,pre", "norm.every=2"])
