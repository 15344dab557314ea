"""Learning plans from a model."""
