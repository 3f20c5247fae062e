"""Judging an adapter: the held-out loss."""
