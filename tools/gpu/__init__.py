"""All that needs a GPU, in one command: `python -m tools.gpu.check`."""
