"""Measures a policy, and draws its images."""

from loopfast.evaluation.benchmark.command import BENCHMARKS, BenchmarkChoice, evaluate_benchmark
from loopfast.evaluation.benchmark.results import as_rich as benchmark_table
from loopfast.evaluation.benchmark.run import SamplingPlan
from loopfast.evaluation.compare import as_rich as comparison_tables
from loopfast.evaluation.compare import compare_runs
from loopfast.evaluation.evaluate import Evaluation, evaluate
from loopfast.evaluation.measure import evaluate_checkpoint
from loopfast.evaluation.models import run_config
from loopfast.evaluation.sample import sample_images

__all__ = [
    "BENCHMARKS",
    "BenchmarkChoice",
    "Evaluation",
    "SamplingPlan",
    "benchmark_table",
    "compare_runs",
    "comparison_tables",
    "evaluate",
    "evaluate_benchmark",
    "evaluate_checkpoint",
    "run_config",
    "sample_images",
]
