"""Results as documents: one model, several renderings."""
