"""Many runs: a sweep's plan, its jobs, their launchers, its report."""


def main() -> None:
    """``python -m simlab.sweep DIR``."""
    from simlab.sweep.__main__ import main as command

    command()
