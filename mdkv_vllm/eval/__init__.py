"""Measure answer quality: tasks, methods, and what they cost."""
