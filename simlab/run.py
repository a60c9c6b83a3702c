"""``python -m simlab.run``: the Hydra entry point. torch is imported when the work begins."""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
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
from simlab.process import tune_process
from simlab.validation import GROUPS, known_keys, options, read

if TYPE_CHECKING:
    from simlab.experiment import RunResult


def fail(message: str) -> NoReturn:
    """One line on stderr, without control codes and not endless, and exit status 2."""
    line = "".join(
        c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(message.split())
    )
    print(f"simlab: {line if len(line) < 1000 else line[:1000] + '…'}", file=sys.stderr)
    raise SystemExit(2)


# What a user, a file or the machine (a full disk, a folder that can't be made) can get wrong.
MISTAKES = (ConfigError, HydraException, OmegaConfBaseException, OSError)


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
            from simlab.experiment import prepare

            for overrides in each_value_once(list(config.hydra.overrides.task)):
                prepare(read(hydra.compose(config.hydra.job.config_name, overrides)))
        except MISTAKES as error:
            fail(explain(error))

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """A sweep's checkpoints side by side, and which of them hold the same weights."""
        from simlab.report.console import compared
        from simlab.store import same_weights, summaries

        jobs = summaries(Path(config.hydra.sweep.dir))
        compared(jobs)
        for weights, same in same_weights(jobs).items():
            named = f"jobs {', '.join(same)} have the same embedding and blocks"
            print(f"simlab: {named} (weight hash {weights[:12]})")


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
    for override, axis in zip(parsed, axes, strict=True):
        if not axis:
            raise ConfigError(f"{override.input_line}: stands for no value at all")
    first = [axis[0] for axis in axes]
    yield first
    for i, axis in enumerate(axes):
        for value in axis[1:]:
            yield [*first[:i], value, *first[i + 1 :]]


RESULTS = (
    "curve.csv", "weights.csv", "growth.png", "growth.svg", "lambda.png", "lambda.svg",
    "inside.png", "inside.svg", "summary.json",
)  # fmt: skip
OUR_FOLDER = re.compile(
    r"outputs|\d{4}-\d\d-\d\d|\d\d-\d\d-\d\d-\d+"
)  # as conf/config.yaml names them


@contextmanager
def nothing_left_behind(folder: Path) -> Iterator[None]:
    """Where a run doesn't end, remove what it and Hydra wrote for it, and folders left empty.

    A folder with a summary holds an earlier, whole result, which stays.
    """
    try:
        yield
    except BaseException:
        if not (folder / RESULTS[-1]).exists():
            shutil.rmtree(folder / ".hydra", ignore_errors=True)
            for name in RESULTS:
                (folder / name).unlink(missing_ok=True)
            remove_empty(folder)
        raise


def remove_empty(folder: Path) -> None:
    """Remove an empty run folder, then those around it that a run makes, up to outputs/."""
    for place in (folder, *folder.parents):
        if place != folder and not OUR_FOLDER.fullmatch(place.name):
            break
        left = [entry.name for entry in place.iterdir()]
        if left == ["multirun.yaml"]:
            (place / left[0]).unlink()
        elif left:
            break
        place.rmdir()


def job(config: DictConfig) -> None:
    """One run: prepare, measure and judge, write, show."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    with nothing_left_behind(folder):
        try:
            checked = read(config)
            from simlab import experiment
            from simlab.report import console

            ready = experiment.prepare(checked)
            console.announce(
                ready.config, ready.parameters, ready.unit, ready.engines, ready.reason
            )
            with console.progress(ready.blocks) as advance:
                result = experiment.measure(ready, advance)
            files = write(result, folder)
        except ConfigError as error:
            fail(str(error))
    console.show(result.curve, result.verdicts, result.summary, files)


def write(result: RunResult, folder: Path) -> list[Path]:
    """curve.csv, the figures, and last summary.json, whose presence says that the run is whole."""
    from simlab import store
    from simlab.report import console, figure, style, trained

    table, summary = folder / "curve.csv", folder / "summary.json"
    store.write_csv(table, result.curve)
    tables = [table]
    if result.weights is not None:
        tables.append(folder / "weights.csv")
        store.write_csv(tables[-1], result.weights)
    title, lines = (
        console.title(result.config),
        console.verdict_lines(result.verdicts, result.summary),
    )
    drawn = {
        "growth": figure.growth_figure(result.curve, title, lines),
        "lambda": figure.lambda_figure(result.curve, result.config.shape.depth, title),
        "inside": trained.inside_figure(result.curve, title),
    }
    files = [f for name, made in drawn.items() if made for f in style.save(made, folder, name)]
    store.write_json(summary, result.summary)
    return [*tables, summary, *files[::-1]]


def explain(error: Exception) -> str:
    """Hydra's and OmegaConf's complaints about an override, in one line, with the nearest name."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        if not group:
            return f"--config-name={name}: no such config"
        names = [option for option in error.options or [] if option != "from_checkpoint"]
        return f"{group}={name}: allowed: {', '.join(names)}{nearest(name, names)}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'error'}: {error.strerror}"
    if match := re.match(r"Could not override '(?P<key>[^']+)'", str(error)):
        key, known = match["key"], known_keys()
        given = next((arg for arg in sys.argv[1:] if arg.lstrip("+~").startswith(key)), key)
        if known.get(key):
            return f"{given}: only with {', '.join(known[key])}"
        return f"{given}: no such key{nearest(key, known) or '; see --help'}"
    if match := re.match(r"Error parsing override '(?P<override>[^']*)'", str(error)):
        return f"{match['override']}: not of the form key=value"
    return "; ".join(line.strip() for line in str(error).splitlines() if line.strip())


def refuse_empty_choices(args: list[str]) -> None:
    """``norm=null`` or ``norm=3``: what names no choice makes Hydra fail beyond explanation."""
    for arg in args:
        group, _, value = arg.partition("=")
        if group in GROUPS and not re.search(r"[A-Za-z]", value.replace("null", "")):
            names = [name for name in options(group) if name != "from_checkpoint"]
            fail(f"{arg}: allowed: {', '.join(names)}")


@hydra.main(config_path=str(CONF_DIR), config_name="config", version_base="1.3")
def _hydra_main(config: DictConfig) -> None:
    job(config)


def main() -> None:
    """The command. Mistakes: one line and exit status 2; Ctrl-C: 130."""
    tune_process()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then hands its errors to us instead of printing
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and cleans up
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without √ gets a question mark
    try:
        refuse_empty_choices(sys.argv[1:])
        _hydra_main()
    except MISTAKES as error:
        fail(explain(error))
    except KeyboardInterrupt:
        print("simlab: interrupted; nothing of the unfinished run was kept", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
