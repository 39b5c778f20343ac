"""Rewards with weights of their own, and their parts."""
