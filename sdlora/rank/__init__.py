"""Singular values of adapters: spectra, smaller ranks, merging, a start from another file."""
