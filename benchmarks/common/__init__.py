"""What all benchmarks use: options, the clock, where results come from, their files and tables."""
