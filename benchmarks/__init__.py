"""Measurements; see NOTES.md."""
