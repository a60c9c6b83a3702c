"""What may still be taken of a machine's memory, from files and variables as systems write them."""

import contextlib
import sys
from types import SimpleNamespace

import pytest
import torch

from simlab.budget import machine
from simlab.budget.machine import MIB, available, calibrate, on_cpu, slurm, system
from simlab.config import ConfigError

MEMINFO = "MemTotal:       24683656 kB\nMemFree:  1 kB\nMemAvailable:   20000000 kB\n"
FREE = 20_000_000 * 1024


def write_files(root, files):
    """A folder with proc/meminfo, and files."""
    for name, text in {"proc/meminfo": MEMINFO, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V1 = "sys/fs/cgroup/memory/jobs/one/memory."
V2 = "sys/fs/cgroup/"
CASES = {
    "no group": ({}, FREE),
    "v2, no limit": (
        {"proc/self/cgroup": "0::/\n", f"{V2}memory.max": "max\n", f"{V2}memory.current": "5\n"},
        FREE,
    ),
    "v2, its own limit": (
        {"proc/self/cgroup": "0::/a/b\n", f"{V2}a/b/memory.max": "4000\n",
         f"{V2}a/b/memory.current": "1500\n",
         f"{V2}a/b/memory.stat": "anon 900\ninactive_file 600\nactive_file 10\n"},
        4000 - 1500 + 600,
    ),
    "v2, a limit above": (
        {"proc/self/cgroup": "0::/a/b\n", f"{V2}a/b/memory.max": "4000\n",
         f"{V2}a/b/memory.current": "0\n", f"{V2}a/memory.max": "3000\n",
         f"{V2}a/memory.current": "2900\n"},
        100,
    ),
    "v2, in a container: its path isn't there": (
        {"proc/self/cgroup": "0::/docker/abc\n", f"{V2}memory.max": "4000\n",
         f"{V2}memory.current": "1000\n"},
        3000,
    ),
    "v1": (
        {"proc/self/cgroup": "9:name=systemd:/\n4:cpu,memory:/jobs/one\n0::/\n",
         f"{V1}limit_in_bytes": "5000\n", f"{V1}usage_in_bytes": "4500\n",
         f"{V1}stat": "inactive_file 1\ntotal_inactive_file 7\n"},
        507,
    ),
    "v1, no limit": (
        {"proc/self/cgroup": "4:memory:/jobs/one\n", f"{V1}usage_in_bytes": "4500\n",
         f"{V1}limit_in_bytes": "9223372036854771712\n"},
        FREE,
    ),
    "more used than allowed": (
        {"proc/self/cgroup": "0::/\n", f"{V2}memory.max": "5\n", f"{V2}memory.current": "9\n"},
        0,
    ),
    "garbage": ({"proc/self/cgroup": "0::/../..\nx\n:\n", f"{V2}memory.max": "\n"}, FREE),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_control_groups(tmp_path, case):
    files, wanted = CASES[case]
    assert on_cpu(write_files(tmp_path, files), {}) == wanted


def test_slurm(tmp_path):
    """MiB for the node or for each CPU, less what the process has already; 0 is all of the node's."""
    pages = machine.os.sysconf("SC_PAGE_SIZE")
    root = write_files(tmp_path, {"proc/self/statm": "900 50 1 1 0 1 0\n"})
    assert on_cpu(root, {"SLURM_MEM_PER_NODE": "2048"}) == 2048 * MIB - 50 * pages
    each = {"SLURM_MEM_PER_CPU": "512", "SLURM_CPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "1"}
    assert slurm(each, 0) == 2048 * MIB
    assert slurm({"SLURM_MEM_PER_CPU": "512", "SLURM_CPUS_PER_TASK": "3"}, 0) == 3 * 512 * MIB
    assert slurm({"SLURM_MEM_PER_CPU": "512", "SLURM_CPUS_PER_TASK": "2(x3)"}, 0) == 512 * MIB
    assert slurm({"SLURM_MEM_PER_NODE": "0"}, 0) is None
    assert slurm({}, 0) is None


def test_without_linux(tmp_path, monkeypatch):
    """All the memory there is, where that is said; else nothing."""
    pages, size = (machine.os.sysconf(name) for name in ("SC_PHYS_PAGES", "SC_PAGE_SIZE"))
    assert system(tmp_path) == pages * size
    monkeypatch.delattr(machine.os, "sysconf")
    assert system(tmp_path) is None
    assert on_cpu(tmp_path, {}) is None


def test_devices(monkeypatch):
    monkeypatch.setattr(machine, "on_cpu", lambda: 900)
    assert [available("cpu"), available(torch.device("cpu"), 4), available("mps")] == [
        900,
        225,
        900,
    ]
    monkeypatch.setattr(machine, "on_cpu", lambda: None)
    assert available("cpu", 4) is None
    cuda = SimpleNamespace(
        mem_get_info=lambda device: (1000, 5000),
        memory_reserved=lambda device: 300,
        memory_allocated=lambda device: 100,
    )
    monkeypatch.setattr(torch, "cuda", cuda)
    assert available("cuda:1", 2) == 600


def test_this_machine_has_some():
    free = available("cpu")
    assert free is not None or sys.platform != "linux"
    assert free is None or free > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rates_are_positive_and_kept(dtype):
    rates = calibrate(dtype)
    assert min(vars(rates).values()) > 0
    assert calibrate(dtype) is rates


@pytest.mark.parametrize("which", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_ulimit(tmp_path, monkeypatch, which):
    """``ulimit -v`` counts addresses, ``-d`` data. The process has 2 MiB of 3; memory is no more."""
    pages = (2 << 20) // machine.os.sysconf("SC_PAGE_SIZE")
    write_files(tmp_path, {"proc/self/statm": f"{pages} 9 9 0 0 {pages} 0\n"})
    infinite = machine.resource.RLIM_INFINITY
    limits = dict.fromkeys((machine.resource.RLIMIT_AS, machine.resource.RLIMIT_DATA), infinite)
    monkeypatch.setattr(machine.resource, "getrlimit", lambda name: (limits[name], infinite))
    assert machine.ulimits(tmp_path) == {}
    limits[getattr(machine.resource, which)] = 3 << 20
    name = {"RLIMIT_AS": "ulimit -v", "RLIMIT_DATA": "ulimit -d"}[which]
    assert machine.ulimits(tmp_path) == {name: (3 << 20, 2 << 20)}
    assert machine.on_cpu(tmp_path, {}) == 1 << 20


@pytest.mark.parametrize(
    ("free", "limits", "cores", "said"),
    [
        (900, {"ulimit -v": 900}, 1, None),
        (900, {"ulimit -v": 800}, 1, "ulimit -v: no_package with what it imports needs 0.00 GB"),
        (900, {"ulimit -v": 900}, 2, "ulimit -v: .*with OMP_NUM_THREADS=1 it needs less"),
        (900, {"ulimit -d": 300}, 1, "ulimit -d: no_package"),
        (100, {}, 1, "memory: no_package with what it imports needs 0.00 GB"),
    ],
)
def test_room_for_imports(tmp_path, monkeypatch, free, limits, cores, said):
    monkeypatch.setattr(machine, "ulimits", lambda _: {k: (v, 0) for k, v in limits.items()})
    monkeypatch.setattr(machine, "on_cpu", lambda _: free)
    monkeypatch.setattr(machine, "pool_size", lambda: cores)
    packages = machine.Packages("no_package", 200, 850, 400, thread=60, pools=2)
    if said is None:
        machine.refuse_imports(packages, tmp_path)
        return
    with pytest.raises(ConfigError, match=said):
        machine.refuse_imports(packages, tmp_path)
    there = machine.Packages("torch", 200, 850, 400, 60, 2)  # it is there already
    machine.refuse_imports(there, tmp_path)


@pytest.mark.parametrize("allowed", [5, 6])
def test_room_for_threads(monkeypatch, allowed):
    """Six are started; those that could be end."""
    real, begun = machine.threading.Thread, []

    class Thread(real):
        def start(self):
            if len(begun) == allowed:
                raise RuntimeError("can't start new thread")
            super().start()
            begun.append(self)

    monkeypatch.setattr(machine.threading, "Thread", Thread)
    with pytest.raises(ConfigError, match="needs 6") if allowed < 6 else contextlib.nullcontext():
        machine.refuse_threads("torch", 6)
    for each in begun:
        each.join(5)
        assert not each.is_alive()
