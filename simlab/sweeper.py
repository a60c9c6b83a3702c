"""The name under which ``.hydra/`` folders of earlier runs know the sweep's callback."""

from simlab.sweep.sweeper import Around

__all__ = ["Around"]
