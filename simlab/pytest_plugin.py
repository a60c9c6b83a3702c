"""The name under which pytest knows the plugin."""

from simlab.regress.pytest_plugin import *  # noqa: F403
