"""Static checks and benchmarks of the kernels."""
