"""Data flows one way: which room may import which, and where torch may not be needed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "simlab"
LOWER = {"config", "validation", "theory", "growth", "store", "baseline"}
# A room and what of simlab it may import, itself always.
MAY = {
    "__init__": {"config", "validation", "experiment", "layout", "model_probe"},
    "reader": {"config"},
    "validation": {"config", "reader"},
    "config": set(),
    "process": set(),
    "inputs": {"config"},
    "statistics": set(),
    "model": {"config"},
    "weights": {"config", "model"},
    "block_probe": {"model", "statistics"},
    "resources": set(),
    "cost": {"config", "resources", "weights"},
    "memory": {"config", "cost", "resources", "statistics", "weights"},
    "loss": {"model", "weights"},
    "engine": {"config", "loss", "model", "weights", "block_probe", "statistics"},
    "layout": {"config"},
    "layout_probe": {"block_probe", "config", "layout", "model", "statistics"},
    "model_probe": {
        "config", "block_probe", "engine", "growth", "layout", "layout_probe", "model", "statistics",
        "theory", "tidy",
    },
    "theory": set(),
    "growth": {"theory"},
    "store": {"config"},
    "report": {"baseline", "config", "growth", "store", "theory"},
    "tidy": {"engine", "growth", "statistics", "theory"},
    "experiment": {
        "config", "inputs", "model", "weights", "cost", "memory", "engine", "tidy", "growth", "theory",
        "store",
    },
    "company": {"config", "cost", "experiment", "inputs", "memory", "resources", "weights"},
    "mistakes": {"config", "validation"},
    "devices": {"config"},
    "job": {
        "config", "validation", "process", "devices", "inputs", "experiment", "store", "report",
    },
    "plan": {"config", "validation"},
    "cluster": {"config", "job", "plan", "store"},
    "sweeper": {
        "config", "validation", "mistakes", "plan", "inputs", "engine", "memory", "experiment",
        "company", "store", "job", "cluster", "report", "sweep",
    },
    "sweep": {"config", "mistakes", "job", "store", "report"},
    "run": {"config", "validation", "process", "mistakes", "job"},
    "baseline": {"config", "growth", "reader", "store"},
    "pytest_plugin": {"config", "growth", "baseline", "layout", "report"},
    "regress": {
        "config", "validation", "process", "mistakes", "baseline", "growth", "experiment", "report",
    },
}  # fmt: skip


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms(path):
    rooms = {p.stem for p in ROOT.glob("*.py")} | {p.name for p in ROOT.iterdir() if p.is_dir()}
    used = {name.split(".")[1] for name in imports(path) if name.startswith("simlab.")} & rooms
    assert used - {room(path)} <= MAY[room(path)]


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_the_lower_half_needs_no_torch(path):
    if room(path) in LOWER | {"report"}:
        assert not {name for name in imports(path) if name.split(".")[0] == "torch"}


def test_the_entry_point_imports_torch_late():
    """What --help and tab completion wait for has no pandas either: it takes a fifth of a second."""
    code = "import sys, simlab.run; sys.exit('torch' in sys.modules or 'pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=100).returncode == 0
    code = "import sys, simlab.sweep, simlab.report.figure; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=100).returncode == 0


def test_simlab_never_imports_scripts():
    for path in ROOT.rglob("*.py"):
        assert not {name for name in imports(path) if name.split(".")[0] == "scripts"}


def test_no_file_is_too_long():
    for path in [*ROOT.rglob("*.py"), *(ROOT.parent / "scripts").glob("*.py")]:
        assert len(path.read_text().splitlines()) <= 420, path
