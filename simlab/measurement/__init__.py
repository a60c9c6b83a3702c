"""The residual stream measured: the engine, probes, statistics, and the tidy frame."""
