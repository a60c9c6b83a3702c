"""The benchmarks of ``benchmark.py``, by subject."""
