"""Times what may stand in the table of launch parameters."""
