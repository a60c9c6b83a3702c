"""Settings of a whole process, for simlab's commands; importing simlab as a library sets none."""

from __future__ import annotations

import atexit
import ctypes
import functools
import gc
import os
import sys

GARBAGE = 50_000  # objects between two collections of the youngest
KEPT = 256 << 20  # bytes of freed memory that stay with the process
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, LARGEST = -1, -3, 32 << 20  # glibc's malloc.h, and its limit


@functools.cache
def tune_process() -> None:
    """Tune memory allocation and garbage collection of a command's process.

    glibc keeps freed memory for the next block: otherwise it maps and zeroes memory anew for every
    tensor, measured as 15 % of olmo2_32b's time. Python collects garbage less often, and not at the
    end: importing torch makes a million objects, which cost the collector 0.4 s of a 1B curve's 1.9 s.
    """
    # NVIDIA's containers set it to 1: float32 products would round their inputs to TF32's 11 bits.
    os.environ["TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"] = "0"
    # pyarrow's own allocator takes a GB of addresses, of which ulimit -v has few.
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    # transformers' advice (kernels to install, ids beyond the vocabulary) isn't about what is measured.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    gc.set_threshold(GARBAGE)
    atexit.register(gc.freeze)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST)
        mallopt(M_TRIM_THRESHOLD, KEPT)
