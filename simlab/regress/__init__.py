"""Recorded growth curves as a regression gate: ``python -m simlab.regress``."""


def before_imports() -> None:
    """What comes before pandas, which takes a second: signals end the process, and so does too little
    memory for it, with one line."""
    from simlab import signals

    signals.end_at_once()
    from simlab.budget.machine import PANDAS, refuse_imports
    from simlab.config.cli_errors import in_one_line

    with in_one_line():
        refuse_imports(PANDAS)


def main() -> None:
    """The command; imported late, as it takes pandas."""
    before_imports()
    from simlab.regress.__main__ import main as command

    command()
