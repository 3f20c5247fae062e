"""Adapters trained on top of each other."""
