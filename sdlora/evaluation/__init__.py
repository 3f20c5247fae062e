"""Judging an adapter: losses at fixed noise, distances between pictures, and how much rank it needs."""
