"""Training: `loop.fit` is the page to read first."""
