"""What the published track allows a submission."""

SIZE_LIMIT_BYTES = 16_000_000  # of model and code, decimal
TIME_LIMIT_S = 600.0  # of training, and again of evaluation
