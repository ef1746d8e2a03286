"""Training: one pure step, and the loop that drives it."""
