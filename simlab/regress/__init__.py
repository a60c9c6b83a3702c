"""Recorded growth curves as a regression gate: ``python -m simlab.regress``."""


def main() -> None:
    """The command; imported late, as it takes torch."""
    from simlab import signals

    signals.end_at_once()
    from simlab.regress.__main__ import main as command

    command()
