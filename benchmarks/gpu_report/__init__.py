"""The page of a device, from the lines that `benchmarks.gpu_check` wrote."""
