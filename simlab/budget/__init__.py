"""A run's time and memory, and the machine's."""
