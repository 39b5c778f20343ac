"""All that one GPU can say about loopfast, in stages: ``python -m benchmarks.gpu_check --help``."""
