"""``python -m simlab.run``: the Hydra entry point. torch is imported when the work begins."""

from __future__ import annotations

import os
import sys

from simlab import signals


def main() -> None:
    """The command. Mistakes: one line and exit status 2; a sweep with failed jobs: 1.

    SIGINT (Ctrl-C): 130; SIGTERM: 143.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then hands its errors to us instead of printing
    kept = "nothing of the unfinished run was kept"
    signals.run_command(lambda: command(sys.argv[1:]), kept)


def command(args: list[str]) -> None:
    """Let Hydra read the command line and start the run or the sweep. Raises SystemExit."""
    if "--version" in args:  # Hydra's option of that name prints Hydra's
        from simlab import __version__

        print(f"simlab {__version__}")
        return
    if {"--help", "-h"} & set(args):  # Hydra's prints one config, and describes nothing
        from simlab.config.help import help_text

        print(help_text())
        return
    import hydra

    from simlab.budget.machine import PANDAS, refuse_imports
    from simlab.budget.process import tune_process
    from simlab.config import CONF_DIR, ConfigError
    from simlab.config.cli_errors import in_one_line
    from simlab.config.command_line import MULTIRUN, refuse_options, refuse_own_files
    from simlab.config.validate import refuse_empty_choices
    from simlab.sweep import job

    tune_process()
    with in_one_line(args):
        refuse_imports(PANDAS)
        refuse_options(args)
        refuse_own_files(args)
        refuse_empty_choices(args)
        if MULTIRUN & set(args) and {"--cfg", "-c"} & set(args):
            raise ConfigError("--cfg shows one job's config: leave -m and the swept values out")
        prefer_our_launchers()
        signals.raise_noted()
        job.STARTED.clear()
        run = hydra.main(config_path=str(CONF_DIR), config_name="config", version_base="1.3")
        with job.nothing_left_behind(job.STARTED):
            run(job.task)()


def prefer_our_launchers() -> None:
    """conf/hydra/launcher in place of the plugins' configs of the same names: Hydra has but one."""
    from hydra.core.config_store import ConfigStore
    from hydra.core.plugins import Plugins

    from simlab.config import CONF_DIR

    Plugins.instance()  # imports them, which registers those
    registered = ConfigStore.instance().repo["hydra"].get("launcher", {})
    for path in (CONF_DIR / "hydra" / "launcher").glob("*.yaml"):
        registered.pop(path.name, None)


if __name__ == "__main__":
    main()
