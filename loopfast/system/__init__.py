"""The machine a run is on: memory, files, signals, streams, the user's own code."""
