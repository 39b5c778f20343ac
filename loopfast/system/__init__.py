"""The machine of a run: memory, files, signals, streams, and the user's own code."""
