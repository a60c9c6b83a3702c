"""``hydra/sweeper=simlab``: Hydra takes plugins from the namespace package ``hydra_plugins`` only.

Every Hydra application in the environment imports this file, so it imports simlab when a sweep runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class SimlabSweeper(Sweeper):
    """Runs every combination of the swept values, all checked before the first one starts.

    params: swept keys and their values, beside those of the command line. max_batch_size: how many
    jobs a launcher is given at a time; None: all.
    """

    def __init__(
        self, params: Mapping[str, Any] | None = None, max_batch_size: int | None = None
    ) -> None:
        self.params, self.max_batch_size = dict(params or {}), max_batch_size

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Keep what Hydra has made of the command line."""
        self.hydra_context, self.config = hydra_context, config
        self.task_function = task_function

    def sweep(self, arguments: list[str]) -> None:
        """Run the jobs; each leaves a record. Raises ConfigError, OSError, SystemExit after Ctrl-C.

        arguments: the command line's overrides, which ``config`` has as well.
        """
        from simlab.sweep.sweeper import Sweep

        assert self.hydra_context is not None
        assert self.config is not None
        Sweep(self.hydra_context, self.task_function, self.config).run()
