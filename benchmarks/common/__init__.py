"""What all benchmarks use: texts and models, the clock, the gate, the files of results."""
