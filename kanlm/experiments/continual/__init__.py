"""Training on one domain after another."""
