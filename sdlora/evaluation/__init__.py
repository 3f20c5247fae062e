"""Judging an adapter: losses at fixed noise, distances between images, and how much rank it needs."""
