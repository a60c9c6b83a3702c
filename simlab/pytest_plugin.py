"""The name under which pytest knows the plugin."""

# Hooks and fixtures alike: pytest finds them by their names in this module.
from simlab.regress.pytest_plugin import *  # noqa: F403
