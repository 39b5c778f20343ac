"""Benchmarks of a model before and after training."""
