"""Speed and memory, each beside its floor: python scripts/benchmark.py WHAT [overrides].

weightless    whole processes: OLMo-2-32B at 64 tokens, forward and with gradients, beside the bare
              normals, Gram matrices, Cholesky factors and products of the same sizes; depth doubled
transformers  whole processes: a 1B curve beside building the model in transformers and asking for
              hidden states
crossover     at which token count dense becomes cheaper, measured, and where engine=auto puts it
truncation    what matching a truncated init by its variance changes, over many seeds
memory        peak of dense olmo2_1b at depth 16 and 64
dense         one dense curve beside drawing as many numbers and the bare matrix products
theory        engine=theory of OLMo-2-32B: the recursion, the verdict on the screen and the whole
              process beside ``import torch``; then a sweep of CONFIGS shapes of width 4096

Machines are noisy: alternating repeats, and figures of one call compare, those of two don't.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from benchmarks.engines import crossover, dense, truncation
from benchmarks.processes import against_transformers, memory, weightless
from benchmarks.theory import theory

BENCHMARKS: dict[str, tuple[Callable[[Sequence[str]], None], list[str]]] = {
    "weightless": (weightless, ["model=olmo2_32b"]),
    "transformers": (against_transformers, ["model=olmo2_1b"]),
    "crossover": (crossover, ["model=olmo2_1b"]),
    "truncation": (truncation, []),
    "memory": (lambda _: memory(), []),
    "dense": (dense, ["model=olmo2_1b"]),
    "theory": (theory, ["model=olmo2_32b"]),
}


def main() -> None:
    """Parse the command line and run one benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=BENCHMARKS)
    parser.add_argument(
        "overrides", nargs="*", help="config overrides, instead of the default model"
    )
    args = parser.parse_args()
    run, default = BENCHMARKS[args.what]
    run(args.overrides or default)


if __name__ == "__main__":
    main()
