"""What ``simlab.run --help`` prints: every choice and key, with its default and what it is.

The words are conf/'s: a choice is described by the comment that its file begins with, a key by the
comment on its line (``config.keys``).
"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from simlab.config.keys import Key, default_choices, known_keys
from simlab.config.schema import CONF_DIR, FROM_CHECKPOINT
from simlab.config.validate import GROUPS, KEEP_KEYS, options

_HEAD = """\
How do activations grow with depth, and why?

  python -m simlab.run                        # OLMo-2-7B's shape at init
  python -m simlab.run depth=64 norm=swin_renorm
  python -m simlab.run model=olmo2_32b gradients=true
  python -m simlab.run model=olmo2_32b engine=theory
  python -m simlab.run source=demo            # a small trained model, offline
  python -m simlab.run source=checkpoint source.path=DIR-OR-HUB-ID \\
      inputs=text inputs.path=FILE
  python -m simlab.run -m depth=8,16,32,64 init.std=0.01,0.02,0.04
  python -m simlab.run -m depth=8,16,32,64 hydra/launcher=joblib
  python -m simlab.run +experiment=issue797
  python -m simlab.sweep DIR                  # a sweep's report again

Arguments are KEY=VALUE, and GROUP=CHOICE for a file in conf/. With -m several
values, parted by commas, make a sweep of every combination. A text with commas,
=, brackets or letters other than a-z needs quotes, and the shell more:
'source.path="run/epoch=1"'. Values shown are the defaults.
"""
_END = """\
A launcher's own keys, such as hydra.launcher.n_jobs, are shown by
python -m simlab.run hydra/launcher=NAME --cfg hydra.

Options:
  -m, --multirun        a sweep
  --cfg job             print the config and run nothing
  -cd DIR               a folder with more choices: DIR/norm/NAME.yaml, say
  -sc install=bash      tab completion: eval "$(simlab-run -sc install=bash)"
  --version             simlab's version
  --hydra-help          Hydra's own options

Exit status: 0 done, 1 a sweep with failed jobs, 2 a mistake, 130 Ctrl-C,
143 SIGTERM.
"""
_ABOUT = {
    "model": "The model's shape",
    "norm": "Where the norms sit",
    "init": "How random weights are drawn",
    "inputs": "The tokens",
    "source": "Where the measured weights come from",
    "experiment": "Experiments, each a sweep with a question",
    "recipe": "Recipes, norm and init together",
    "hydra/launcher": "Where a sweep's jobs run",
}
_BESIDE = {  # groups that aren't in a run's own config, as the command line has them
    "experiment": "+experiment",
    "recipe": "+recipe",
    "hydra/launcher": "hydra/launcher",
}
_COLUMN, _WIDTH = 28, 80


def help_text() -> str:
    """The whole help, 80 columns wide."""
    keys = known_keys()
    parts = [_HEAD]
    for group in GROUPS:
        default = default_choices()[group]
        others = [n for n in options(group) if n not in (default, FROM_CHECKPOINT)]
        of_group = {name: key for name, key in keys.items() if key.group == group}
        parts += [f"{_ABOUT[group]}: {group}={default} or another of"]
        parts += [*_choices(group, [default, *others]), ""]
        parts += [*_by_choice(group, of_group, {default, *others}), ""]
    own = {name: key for name, key in keys.items() if not key.group and name not in GROUPS}
    parts += ["The run", *_keys({k: v for k, v in own.items() if k not in KEEP_KEYS}), ""]
    parts += ["Sweeps and results", *_keys({k: own[k] for k in KEEP_KEYS})]
    parts += _entry("hydra.run.dir", "the folder of a run's files; outputs/DAY/TIME by default")
    parts += [*_entry("hydra.sweep.dir", "the folder of a sweep's files; the same"), ""]
    for group, written in _BESIDE.items():
        parts += [f"{_ABOUT[group]}: {written}=NAME", *_choices(group, options(group)), ""]
    return "\n".join([*parts, _END])


def _choices(group: str, names: Sequence[str]) -> list[str]:
    lines = []
    for name in names:
        lines += _entry(name, first_comment(CONF_DIR / group / f"{name}.yaml"))
    return lines


def _by_choice(group: str, keys: Mapping[str, Key], choices: set[str]) -> list[str]:
    """A group's keys: those that all choices have, then those that only some have."""
    parts: dict[str, dict[str, Key]] = {"": {}}
    for name, key in keys.items():
        only = set(key.choices) & choices
        parent = any(other.startswith(f"{name}.") for other in keys)  # null, or the keys below it
        without = choices - only
        title = "" if parent or not without else f"only with {group}={', '.join(sorted(only))}"
        if title and len(without) < 3 < len(only):
            title = f"not with {group}={', '.join(sorted(without))}"
        parts.setdefault(title, {})[name] = key
    lines = []
    for title, part in parts.items():
        lines += textwrap.wrap(title, _WIDTH, initial_indent="    ", subsequent_indent="    ")
        lines += _keys(part)
    return lines


def _keys(keys: Mapping[str, Key]) -> list[str]:
    lines = []
    for name, key in keys.items():
        others = ", ".join(f"{choice} {value}" for choice, value in key.others.items())
        about = f"{key.about} ({key.choices[0]}'s; {others})" if others else key.about
        lines += _entry(f"{name}={key.default}", about)
    return lines


def _entry(name: str, about: str) -> list[str]:
    """A name and what it is, beside it or below."""
    start = f"  {name}".ljust(_COLUMN) + " " if len(name) + 3 <= _COLUMN else ""
    below = " " * (_COLUMN + 1)
    lines = textwrap.wrap(about, _WIDTH, initial_indent=start or below, subsequent_indent=below)
    return lines if start else [f"  {name}", *lines]


def first_comment(path: Path) -> str:
    """The comment that a file in conf/ begins with."""
    lines = path.read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if not line.startswith("# @package")]
    head = itertools.takewhile(lambda line: line.startswith("#"), lines)
    return " ".join(line.removeprefix("#").strip() for line in head)
