"""Benchmarks of the whole engine: an iteration, its rollout and its updates."""
