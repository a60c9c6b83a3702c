"""``simlab.run --help``: every choice and key with its description, from conf/."""

import dataclasses
import re

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from simlab.config import CONF_DIR
from simlab.config.help import first_comment, help_text
from simlab.config.keys import known_keys
from simlab.config.validate import GROUPS, options

TEXT = help_text()


def dotted(values, above=""):
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from dotted(value, f"{above}{key}.")
        else:
            yield f"{above}{key}"


def test_every_key_is_described():
    """That a composed config has, whatever is chosen: every choice is in one of these configs."""
    keys = set()
    names = {g: [n for n in options(g) if n != "from_checkpoint"] for g in GROUPS}
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        for i in range(max(map(len, names.values()))):
            chosen = [f"{group}={all_[i % len(all_)]}" for group, all_ in names.items()]
            config = compose("config", overrides=chosen)
            keys |= set(dotted(OmegaConf.to_container(config)))
    known = {name: key for name, key in known_keys().items() if name not in GROUPS}
    assert keys == set(known)
    assert not [name for name, key in known.items() if not key.about]
    assert keys == set(re.findall(r"^  ([\w.]+)=", TEXT, re.M))


def test_every_choice_is_described():
    for group in (*GROUPS, "experiment", "recipe", "hydra/launcher"):
        for name in set(options(group)) - {"from_checkpoint"}:
            about = first_comment(CONF_DIR / group / f"{name}.yaml")
            assert about, (group, name)
            assert f"  {name} " in TEXT
            assert " ".join(about.split()[:3]) in " ".join(TEXT.split())
    assert "+experiment=" in TEXT
    assert max(map(len, TEXT.splitlines())) <= 80


def test_what_a_key_is_said_to_be():
    """Its default is the default choice's, its comment too, and some choices alone have it."""
    keys = known_keys()
    depth = dataclasses.asdict(keys["depth"])
    names = [name for name in options("model") if name != "from_checkpoint"]
    assert sorted(depth.pop("choices")) == names
    assert depth == {"default": "32", "about": "blocks", "group": "model", "others": {}}
    assert keys["norm.alpha"].others == {"ngpt": "0.05", "rezero": "0.0"}
    assert "(layerscale's; ngpt 0.05, rezero 0.0)" in " ".join(TEXT.split())
    assert keys["norm.every"].choices == ["swin_renorm"]
    assert keys["source.text"].default == "…"
    assert keys["model.yarn"].default == "null"
    assert keys["model.yarn.factor"].choices == ["olmo3_32b", "olmo3_7b"]
    assert "hydra.run.dir" not in keys
    lines = [line.strip() for line in TEXT.splitlines()]
    at = lines.index("only with norm=swin_renorm")
    assert lines[at + 1].startswith("norm.every=6 ")
    assert lines[lines.index("not with norm=ngpt, none") + 1].startswith("norm.gain=1.0 ")
