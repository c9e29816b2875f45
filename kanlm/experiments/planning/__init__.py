"""Memory and time of a training job, before it starts."""
