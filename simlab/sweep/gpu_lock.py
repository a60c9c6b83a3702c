"""Gives each of several jobs on a machine its own GPU, by file locks that end with the process."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from simlab.config import ConfigError

try:
    import fcntl
except ImportError:  # no such locks on Windows: jobs then share the first GPU, as torch has it
    fcntl = None  # type: ignore[assignment]  # a module's name, for where there is none

WAIT = 0.2  # seconds between two looks for a free GPU


def lock_folder() -> Path:
    """Where this user's locks are. Raises ConfigError where somebody else's folder has that name."""
    user = os.getuid() if hasattr(os, "getuid") else 0
    folder = Path(tempfile.gettempdir()) / f"simlab-gpus-{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or (hasattr(os, "getuid") and folder.stat().st_uid != user):
        raise ConfigError(f"{folder}: not this user's; it is needed for the GPUs' locks")
    return folder


def take_gpu(names: list[str], folder: Path) -> tuple[int, IO[str]]:
    """The first of these GPUs that no other job has, waiting for one; and its lock, to be closed."""
    waiting = False
    while True:
        for index, name in enumerate(names):
            lock = (folder / name).open("w")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return index, lock
            except BlockingIOError:
                lock.close()
        if not waiting:
            waiting = True
            print(f"simlab: waiting for one of {len(names)} GPUs, all have a job", file=sys.stderr)
        time.sleep(WAIT)


@contextmanager
def own_gpu(device: str) -> Iterator[None]:
    """Lock a GPU that no other job has, and make it torch's current device, which ``cuda`` means.

    device: as in the config; only ``auto`` and ``cuda`` on a machine with several GPUs need a lock.
    """
    if device not in ("auto", "cuda") or fcntl is None:
        yield
        return
    import torch

    count = torch.cuda.device_count()
    if count < 2:
        yield
        return
    names = [str(torch.cuda.get_device_properties(i).uuid) for i in range(count)]
    index, lock = take_gpu(names, lock_folder())
    with lock, torch.cuda.device(index):
        yield
