"""What a run will take, before it runs: steps, memory and time."""
