"""Times a model in FastEncoder, sentence-transformers and other runtimes, side by side on a CPU."""
