"""Benchmarks of kernels, loading, the planner and several GPUs."""
