"""Several jobs on a machine with several GPUs: each has its own."""

import contextlib
import itertools
import multiprocessing
import queue
import threading
import time
from types import SimpleNamespace

import pytest

from simlab.sweep.gpu_lock import own_gpu, take_gpu


def hold(folder, names, spans, seconds):
    index, lock = take_gpu(names, folder)
    start = time.monotonic()
    time.sleep(seconds)
    spans.put((index, start, time.monotonic()))
    lock.close()


def test_one_job_on_a_gpu_at_a_time(tmp_path):
    """Seven jobs, three GPUs: on each, one after another, and none waits while one is free.

    Threads do for processes here: a lock is an open file's, and each opens its own.
    """
    spans, names = queue.Queue(), ["GPU-a", "GPU-b", "GPU-c"]
    jobs = [threading.Thread(target=hold, args=(tmp_path, names, spans, 0.3)) for _ in range(7)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    held = list(spans.queue)
    for index in range(3):
        of_gpu = sorted((start, stop) for gpu, start, stop in held if gpu == index)
        assert len(of_gpu) >= 2
        assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(of_gpu))


def test_a_killed_process_leaves_its_gpu(tmp_path):
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=hold, args=(tmp_path, ["GPU-a"], None, 60))
    process.start()
    while not (tmp_path / "GPU-a").exists():
        time.sleep(0.05)
    process.kill()
    process.join()
    index, lock = take_gpu(["GPU-a"], tmp_path)
    lock.close()
    assert index == 0


def test_one_gpu_needs_no_lock(monkeypatch, tmp_path):
    import torch  # not above: the processes that are started import this file

    monkeypatch.setattr(
        "simlab.sweep.gpu_lock.lock_folder", lambda: pytest.fail("asked for a lock")
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for device in ("auto", "cuda", "cpu", "cuda:1"):
        with own_gpu(device):
            pass


def test_free_gpu_becomes_the_current_one(monkeypatch, tmp_path):
    import torch  # not above: the processes that are started import this file

    chosen = []

    @contextlib.contextmanager
    def current(index):
        chosen.append(index)
        yield

    def properties(index):
        return SimpleNamespace(uuid=f"GPU-{index}")

    monkeypatch.setattr("simlab.sweep.gpu_lock.lock_folder", lambda: tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "device", current)
    with own_gpu("auto"), own_gpu("cuda"):
        pass
    with own_gpu("cuda:2"):  # asked for by number: that one it is
        pass
    assert chosen == [0, 1]
