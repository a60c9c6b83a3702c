"""What a run costs, in time and memory, and what the machine has."""
