"""All checks and measurements of loopfast on one GPU, in stages: ``python -m benchmarks.gpu_check --help``."""
