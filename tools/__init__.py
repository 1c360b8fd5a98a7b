"""What developers run beside the tests and the benchmarks."""
