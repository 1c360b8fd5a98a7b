"""Times whole texts through whole encoders."""
