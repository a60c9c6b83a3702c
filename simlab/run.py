"""``python -m simlab.run``: the Hydra entry point. torch is imported when the work begins."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from simlab.config import CONF_DIR, ConfigError, nearest
from simlab.validation import known_keys, read

if TYPE_CHECKING:
    from simlab.experiment import RunResult


def fail(message: str) -> NoReturn:
    """One line on stderr, exit status 2."""
    print(f"simlab: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


MISTAKES = (ConfigError, HydraException, OmegaConfBaseException)


class CheckFirst(Callback):
    """Before Hydra makes a folder, everything that the user named is looked at."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Check a run's config, files and device; exit status 2 for a mistake in them."""
        try:
            checked = read(config)
            from simlab.experiment import prepare

            prepare(checked)
        except MISTAKES as error:
            fail(explain(error))

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Check every value that a sweep names, before its first job."""
        try:
            for overrides in each_value_once(list(config.hydra.overrides.task)):
                read(hydra.compose(config.hydra.job.config_name, overrides))
        except MISTAKES as error:
            fail(explain(error))


def each_value_once(overrides: list[str]) -> Iterator[list[str]]:
    """Single runs in which every value of every swept key occurs; not all combinations of them."""
    loader = GlobalHydra.instance().config_loader()
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(overrides)
    axes = [
        [f"{o.get_key_element()}={value}" for value in o.sweep_string_iterator()]
        if o.is_sweep_override()
        else [str(o.input_line)]
        for o in parsed
    ]
    first = [axis[0] for axis in axes]
    yield first
    for i, axis in enumerate(axes):
        for value in axis[1:]:
            yield [*first[:i], value, *first[i + 1 :]]


@contextmanager
def nothing_left_behind(folder: Path) -> Iterator[None]:
    """Remove what Hydra wrote for a run that didn't end: its .hydra, and folders left empty."""
    try:
        yield
    except BaseException:
        if not (folder / "summary.json").exists():
            shutil.rmtree(folder / ".hydra", ignore_errors=True)
            for empty in (folder, *folder.parents[:2]):
                if not empty.is_dir() or any(empty.iterdir()):
                    break
                empty.rmdir()
        raise


def job(config: DictConfig) -> None:
    """One run: prepare, measure and judge, write, show."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    with nothing_left_behind(folder):
        try:
            checked = read(config)
            from simlab import experiment
            from simlab.report import console

            ready = experiment.prepare(checked)
            console.announce(ready.config, ready.parameters, str(ready.device))
            with console.progress(ready.blocks) as advance:
                result = experiment.measure(ready, advance)
            files = write(result, folder)
        except ConfigError as error:
            fail(str(error))
    console.show(result.curve, result.verdicts, result.summary["overflow"], files)


def write(result: RunResult, folder: Path) -> list[Path]:
    """curve.csv, the figure, and last summary.json, whose presence says that the run is whole."""
    from simlab import store
    from simlab.report import console, figure

    table, summary = folder / "curve.csv", folder / "summary.json"
    store.write_csv(table, result.curve)
    lines = console.verdict_lines(result.verdicts, result.summary["overflow"])
    drawn = figure.growth_figure(result.curve, console.title(result.config), lines)
    png, svg = figure.save(drawn, folder)
    store.write_json(summary, result.summary)
    return [table, summary, svg, png]


def explain(error: Exception) -> str:
    """Hydra's and OmegaConf's complaints about an override, in one line, with the nearest name."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        names = [option for option in error.options or [] if option != "from_checkpoint"]
        return f"{group}={name}: allowed: {', '.join(names)}{nearest(name, names)}"
    if match := re.match(r"Could not override '(?P<key>[^']+)'", str(error)):
        key, known = match["key"], known_keys()
        given = next((arg for arg in sys.argv[1:] if arg.lstrip("+~").startswith(key)), key)
        if known.get(key):
            return f"{given}: only with {', '.join(known[key])}"
        return f"{given}: no such key{nearest(key, known) or '; see --help'}"
    if match := re.match(r"Error parsing override '(?P<override>[^']*)'", str(error)):
        return f"{match['override']}: not of the form key=value"
    return "; ".join(line.strip() for line in str(error).splitlines() if line.strip())


@hydra.main(config_path=str(CONF_DIR), config_name="config", version_base="1.3")
def _hydra_main(config: DictConfig) -> None:
    job(config)


def main() -> None:
    """The command. Mistakes: one line and exit status 2; Ctrl-C: 130."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then hands its errors to us instead of printing
    try:
        _hydra_main()
    except MISTAKES as error:
        fail(explain(error))
    except KeyboardInterrupt:
        print("simlab: interrupted; nothing of the unfinished run was kept", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
