"""Data flows one way: which room may import which, and where torch may not be needed."""

import ast
import re
import subprocess
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1] / "simlab"
TOUR = (ROOT.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
# A room, and the rooms (or modules at the root) that it may import; itself always.
MAY = {
    room: set(imported.split(", ")) - {"–"}
    for room, imported in re.findall(r"^\| `(\w+)/` \| .* \| (.+) \|$", TOUR, flags=re.MULTILINE)
}
DOORS = {  # may import anything
    "__init__", "__main__", "api", "inputs", "pytest_plugin", "results", "run", "signals", "store",
    "sweeper",
}  # fmt: skip
NO_TORCH = {"config", "schemes", "theory", "analysis", "report", "store"}


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


@cache
def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, path  # a relative import would be missed
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def test_rooms_import_only_what_they_may():
    wrong = []
    for path in modules():
        here = room(path)
        used = {name.split(".")[1] for name in imports(path) if name.startswith("simlab.")}
        rooms = {other for other in used if other in MAY or other in DOORS} - {here}
        if here not in DOORS and rooms - MAY[here]:
            wrong.append(f"{path.relative_to(ROOT)}: {', '.join(sorted(rooms - MAY[here]))}")
    assert not wrong


def test_every_module_is_in_a_room():
    assert {room(path) for path in modules()} <= {*MAY, *DOORS}
    assert len(list(ROOT.glob("*.py"))) <= 10


def test_rooms_that_need_no_torch():
    torch = [
        str(path.relative_to(ROOT))
        for path in modules()
        if room(path) in NO_TORCH and any(n.split(".")[0] == "torch" for n in imports(path))
    ]
    assert not torch


# What is imported or called, one after another, and what then isn't imported: --help and tab completion
# wait for torch and pandas, a verdict on the screen 2 s for seaborn, a run of two seconds 0.8 for
# torch's compiler; a predicted curve needs none of them.
LATE = {
    "import simlab": "torch",
    "assert {*simlab.__all__} <= {*dir(simlab)}": "torch",
    "import simlab.run": "torch pandas",
    "import simlab.regress": "torch",
    "import simlab.report.console": "torch matplotlib seaborn scipy",
    "sys.argv[1:] = ['model=small', 'depth=2', 'engine=theory']; simlab.run.main()":
        "torch transformers safetensors tokenizers seaborn scipy",
    "sys.argv[1:] = ['-m', 'model=small', 'depth=1,2', 'engine=theory']; simlab.run.main()": "torch",
    "import simlab.sweep.report, simlab.report.figure": "torch",
    "from simlab import experiment; "
    "experiment.prepare(simlab.compose(['model=small', 'depth=1', 'device=cpu'])).estimate":
        "torch._dynamo sympy",
}  # fmt: skip


def test_heavy_imports_are_late(tmp_path):
    lines = ["import sys"]
    for code, heavy in LATE.items():
        lines += [code, f"assert not {{*{heavy.split()}}} & {{*sys.modules}}, {code!r}"]
    code = "\n".join(lines)
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100, cwd=tmp_path)


def test_simlab_never_imports_scripts_or_tests():
    """Both are on the path of a test run, so that an import of one would fail elsewhere only."""
    scripts, tests = ROOT.parent / "scripts", Path(__file__).parent
    beside = {path.stem for path in [*scripts.glob("*"), *tests.rglob("*.py")]}
    assert {"mutations", "benchmark", "conftest", "probed"} <= beside
    for path in modules():
        used = {name.split(".")[0] for name in imports(path)}
        assert not used & {*beside, "scripts", "tests"}, path


def public_names(path: Path) -> set[str]:
    """The names that a module defines at its top level, without those that begin with _."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return {name for name in names if not name.startswith("_")}


def test_public_names_are_unique():
    """But for ``main``, what type checkers know, what each format is asked for, and simlab's verbs."""
    homes = defaultdict(set)
    for path in modules():
        shared = {"main", "TYPE_CHECKING"}
        if path.parent.name == "formats":
            shared |= {"KEYS", "matches", "open_folder", "read_config"}
        if path.name == "api.py":
            shared |= {"measure", "load"}
        for name in public_names(path) - shared:
            homes[name].add(str(path.relative_to(ROOT)))
    assert not {name: sorted(paths) for name, paths in homes.items() if len(paths) > 1}


def test_no_file_is_too_long():
    for path in [*modules(), *(ROOT.parent / "scripts").rglob("*.py")]:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 420, path
