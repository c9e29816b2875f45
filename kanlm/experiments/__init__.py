"""What researchers launch. Each calls training and evaluation and writes results.json."""
