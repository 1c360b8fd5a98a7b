"""Times every op beside its peers, and what the hardware does alone."""
