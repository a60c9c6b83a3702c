"""The machine: how much memory a process may still take, and how fast the machine computes.

On a CPU the system, the control groups that the process is in (containers; versions 1 and 2), SLURM's
allocation, ``ulimit -v`` and ``ulimit -d`` each set a limit; the lowest counts. Sizes are in bytes.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from simlab.config import ConfigError

if TYPE_CHECKING:
    import torch

try:
    import resource
except ImportError:  # Windows has no such limits
    resource = None  # type: ignore[assignment]  # a module's name, for where there is none

MIB = 1 << 20
# A control group's limit, its usage, and what of that the system can take back, by version.
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("memory.max", "memory.current", "inactive_file")
SLURM_CPUS = ("SLURM_CPUS_ON_NODE", "SLURM_CPUS_PER_TASK")


def available(device: torch.device | str, share: int = 1) -> int | None:
    """Bytes that a process may still take on a device; None where it isn't known.

    share: the number of processes that start together and divide the memory. MPS has the CPU's.
    """
    kind = str(device).partition(":")[0]
    free = on_cuda(str(device)) if kind == "cuda" else on_cpu()
    return None if free is None else free // share


def on_cuda(device: str) -> int:
    """The device's free memory, and what torch has reserved of it without using it."""
    import torch  # late: `--help` needs none

    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def on_cpu(root: Path = Path("/"), environment: Mapping[str, str] = os.environ) -> int | None:
    """The lowest of the known limits. root: the folder of proc/ and sys/."""
    limits = [system(root), slurm(environment, resident(root)), *cgroup_memory(root)]
    limits += [most - used for most, used in ulimits(root).values()]
    sizes = [max(0, size) for size in limits if size is not None]
    return min(sizes, default=None)


def system(root: Path) -> int | None:
    """Linux: the memory available without swapping. Elsewhere: the machine's whole memory."""
    free = _entry(root / "proc/meminfo", "MemAvailable:")
    if free is not None:
        return free * 1024
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def cgroup_memory(root: Path) -> Iterator[int]:
    """The memory left in each control group of the process, from its own to the topmost, in bytes."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            mount, files = root / "sys/fs/cgroup", V2
        elif "memory" in controllers.split(","):
            mount, files = root / "sys/fs/cgroup/memory", V1
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for count in range(len(parts), -1, -1):
            left = _left(mount.joinpath(*parts[:count]), *files)
            if left is not None:
                yield left


def _left(folder: Path, limit: str, usage: str, cached: str) -> int | None:
    """A group's limit less its usage; pages of files that can be dropped don't count as used."""
    most, used = _integer(_text(folder / limit)), _integer(_text(folder / usage))
    if most is None or used is None:
        return None  # no such file, or "max"
    return most - used + (_entry(folder / "memory.stat", cached) or 0)


def slurm(environment: Mapping[str, str], used: int) -> int | None:
    """SLURM's allocation on this node, less what the process uses; None without one."""
    node = _integer(environment.get("SLURM_MEM_PER_NODE", ""))
    each = _integer(environment.get("SLURM_MEM_PER_CPU", ""))
    cpus = next((n for key in SLURM_CPUS if (n := _integer(environment.get(key, "")))), 1)
    mebibytes = node or (each or 0) * cpus  # 0: all of the node's
    return mebibytes * MIB - used if mebibytes else None


def resident(root: Path = Path("/")) -> int:
    """The process's resident memory in bytes; 0 if unknown."""
    return _pages(root)[1]


def _pages(root: Path) -> tuple[int, int, int]:
    """The process's addresses, resident memory and data with stacks in bytes; 0 if unknown."""
    pages = _text(root / "proc/self/statm").split()
    if len(pages) < 6:
        return 0, 0, 0
    page = os.sysconf("SC_PAGE_SIZE")
    return int(pages[0]) * page, int(pages[1]) * page, int(pages[5]) * page


def ulimits(root: Path = Path("/")) -> dict[str, tuple[int, int]]:
    """For each limit that the process has on its memory: what is allowed and what it has, in bytes.

    Memory that isn't used yet counts: threads' stacks, and of ``ulimit -v`` files that are mapped.
    """
    if resource is None:
        return {}
    used, _, data = _pages(root)
    found = {
        "ulimit -v": (resource.getrlimit(resource.RLIMIT_AS)[0], used),
        "ulimit -d": (resource.getrlimit(resource.RLIMIT_DATA)[0], data),
    }
    return {name: both for name, both in found.items() if both[0] != resource.RLIM_INFINITY}


@dataclass(frozen=True)
class Packages:
    """The memory of imported packages, in bytes: resident, addresses, data.

    addresses, data: with one thread; thread: of both, for each thread more that their pools start.
    pools: how many of them start threads, one for each core (OpenBLAS's, pyarrow's, torch's).
    """

    name: str
    resident: int
    addresses: int
    data: int
    thread: int
    pools: int


# Measured, in MiB, with scipy and matplotlib on one core: 149 resident, 439 addresses, 174 data; torch
# with these 344, 925, 297. The second core adds 80, with torch 208: OpenBLAS's, twice, and torch's
# threads, their stacks and buffers. With 590 and 1050 addresses on two cores some runs crash.
PANDAS = Packages("pandas", 130 * MIB, 620 * MIB, 230 * MIB, 85 * MIB, 3)
TORCH = Packages("torch", 295 * MIB, 1000 * MIB, 400 * MIB, 210 * MIB, 4)


def refuse_imports(packages: Packages, root: Path = Path("/")) -> None:
    """Raise ConfigError where these packages alone need more than the process may take.

    They would crash or hang while they are imported, some of them without an exception.
    """
    if packages.name in sys.modules:
        return
    more = pool_size() - 1
    free, resident_now = on_cpu(root), resident(root)
    allowed = {what: most for what, (most, _) in ulimits(root).items()}
    if free is not None:
        allowed["memory"] = free + resident_now
    needs = {
        "ulimit -v": packages.addresses + more * packages.thread,
        "ulimit -d": packages.data + more * packages.thread,
        "memory": packages.resident,
    }
    for what, has in allowed.items():
        if has < needs[what]:
            numbers = f"needs {needs[what] / 1e9:.2f} GB, {has / 1e9:.2f} GB are allowed"
            hint = "; with OMP_NUM_THREADS=1 it needs less"
            hint = hint if more and what != "memory" else ""
            raise ConfigError(f"{what}: {packages.name} with what it imports {numbers}{hint}")
    # Not under ulimit -v: glibc would reserve 64 MiB of its addresses for each thread, for good.
    if "ulimit -v" not in allowed:
        refuse_threads(packages.name, (more + 1) * packages.pools)


def pool_size() -> int:
    """How many threads a pool of NumPy's or torch's has: a core has one."""
    asked = _integer(os.environ.get("OMP_NUM_THREADS", ""))
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, min(asked or cores, cores))


def refuse_threads(name: str, count: int) -> None:
    """Raise ConfigError where the system doesn't allow ``count`` more threads.

    Thread pools of C code would end the process then.

    A limit on processes (``ulimit -u``, or a control group's) counts threads.
    """
    done = threading.Event()
    started = [threading.Thread(target=done.wait, daemon=True) for _ in range(count)]
    try:
        for each in started:
            each.start()
    except RuntimeError as error:
        raise ConfigError(
            f"threads: {name} with what it imports needs {count}, and the system allows fewer "
            "(ulimit -u or a control group); OMP_NUM_THREADS=1 needs fewer"
        ) from error
    finally:
        done.set()


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _integer(text: str) -> int | None:
    return int(text) if text.strip().isdecimal() else None


def _entry(path: Path, name: str) -> int | None:
    """The number after a name, in a file of names and numbers."""
    for line in _text(path).splitlines():
        words = line.split()
        if len(words) > 1 and words[0] == name:
            return _integer(words[1])
    return None


@dataclass(frozen=True)
class Rates:
    """Seconds that this machine takes for one operation of each kind.

    product: one operation of a matrix product in the run's dtype. wide: the same in float32. number:
    drawing one normal, on all threads. entry: reading and writing one entry of a large float32 tensor.
    call: one call of torch on a tensor of 64 entries.
    """

    product: float
    wide: float
    number: float
    entry: float
    call: float


@cache
def calibrate(
    dtype: str = "float32", device: str = "cpu", clock: Callable[[], float] = time.perf_counter
) -> Rates:
    """Measured in 0.1 s, each the best of three; more where others keep the machine busy."""
    import numpy as np
    import torch

    def best(work: Callable[[], object]) -> float:
        def once() -> float:
            start = clock()
            work()
            if device.startswith("cuda"):
                torch.cuda.synchronize(device)
            return clock() - start

        return min(once() for _ in range(3))

    x = torch.full((256, 1024), 0.5, device=device)
    w = torch.full((1024, 1024), 0.5, device=device)
    low = x.to(getattr(torch, dtype)), w.to(getattr(torch, dtype))
    large = torch.full(
        (1 << 23,), 0.5, device=device
    )  # malloc doesn't keep it: new pages each time
    generators = [np.random.Generator(np.random.SFC64(i)) for i in range(torch.get_num_threads())]
    buffers = [np.empty(1 << 16, np.float32) for _ in generators]

    def draw(i: int) -> None:
        for _ in range(4):
            generators[i].standard_normal(out=buffers[i], dtype=np.float32)

    def calls() -> None:
        for _ in range(100):
            torch.add(small, small)

    with torch.no_grad(), ThreadPoolExecutor(len(generators)) as pool:
        small = x[:8, :8]
        operations = 2 * x.numel() * len(w)
        wide = best(lambda: x @ w) / operations
        product = wide if dtype == "float32" else best(lambda: low[0] @ low[1]) / operations
        numbers = 4 * (1 << 16) * len(generators)
        number = best(lambda: list(pool.map(draw, range(len(generators))))) / numbers
        entry, call = best(lambda: large + 1) / large.numel(), best(calls) / 100
    return Rates(product, wide, number, entry, call)
