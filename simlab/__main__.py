"""``python -m simlab``: the commands that there are, and the versions they run with."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import version

from simlab import signals

COMMANDS = {
    "run": "measure a model, or with -m many: curves, a verdict, figures",
    "sweep": "report on a sweep's folder, finished or not",
    "regress": "hold growth curves against recorded ones",
}
PACKAGES = {"simlab": "simlab", "torch": "torch", "numpy": "numpy", "hydra": "hydra-core"}


def main() -> None:
    """The command."""
    signals.run_command(_command, "there was nothing to keep")


def _command() -> None:
    """Print them. No package is imported for its version: torch alone would take a second.

    ``--version`` prints simlab's alone. Anything else ends with one line and exit status 2.
    """
    if sys.argv[1:] == ["--version"]:
        print(f"simlab {version('simlab')}")
        return
    if sys.argv[1:] not in ([], ["--help"], ["-h"]):
        allowed = f"python -m simlab.COMMAND, COMMAND one of {', '.join(COMMANDS)}"
        print(f"simlab: {' '.join(sys.argv[1:])}: allowed: {allowed}", file=sys.stderr)
        raise SystemExit(2)
    print("How do activations grow with depth, and why?\n")
    for name, what in COMMANDS.items():
        print(f"  python -m simlab.{name:<8} {what}")
    versions = [f"{name} {version(package)}" for name, package in PACKAGES.items()]
    print("\nEach has --help.", ", ".join([*versions, f"Python {platform.python_version()}"]))


if __name__ == "__main__":
    main()
