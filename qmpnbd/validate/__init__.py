"""Validation: what is served against what the images hold."""
