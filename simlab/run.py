"""``python -m simlab.run``: the Hydra entry point. torch is imported when the work begins."""

from __future__ import annotations

import io
import os
import re
import signal
import sys

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins

from simlab.budget.process import tune_process
from simlab.config import CONF_DIR
from simlab.config.cli_errors import fail, in_one_line
from simlab.config.validate import GROUPS, options
from simlab.sweep.job import task


def refuse_empty_choices(args: list[str]) -> None:
    """``norm=null`` or ``norm=3``: what names no choice makes Hydra fail beyond explanation."""
    for arg in args:
        group, _, value = arg.partition("=")
        if group in GROUPS and not re.search(r"[A-Za-z]", value.replace("null", "")):
            names = [name for name in options(group) if name != "from_checkpoint"]
            fail(f"{arg}: allowed: {', '.join(names)}")


def prefer_our_launchers() -> None:
    """conf/hydra/launcher in place of the plugins' configs of the same names: Hydra has but one."""
    Plugins.instance()  # imports them, which registers those
    registered = ConfigStore.instance().repo["hydra"].get("launcher", {})
    for path in (CONF_DIR / "hydra" / "launcher").glob("*.yaml"):
        registered.pop(path.name, None)


def main() -> None:
    """The command. Mistakes: one line and exit status 2; a sweep with failed jobs: 1; Ctrl-C: 130."""
    tune_process()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then hands its errors to us instead of printing
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and cleans up
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without √ gets a question mark
    try:
        with in_one_line():
            refuse_empty_choices(sys.argv[1:])
            if {"-m", "--multirun"} & set(sys.argv) and {"--cfg", "-c"} & set(sys.argv):
                fail("--cfg shows one job's config: leave -m and the swept values out")
            prefer_our_launchers()
            hydra.main(config_path=str(CONF_DIR), config_name="config", version_base="1.3")(task)()
    except KeyboardInterrupt:
        print("simlab: interrupted; nothing of the unfinished run was kept", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
