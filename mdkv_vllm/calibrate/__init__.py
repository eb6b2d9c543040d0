"""Calibrate a basis for a model, and keep it in a file that knows whose it is."""
