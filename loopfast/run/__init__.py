"""A run's folder and record, and its display."""
