"""Faster calls of the same networks."""
