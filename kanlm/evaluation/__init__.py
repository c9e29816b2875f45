"""Numbers on held-out text: losses, their uncertainty, and references to hold them against."""
