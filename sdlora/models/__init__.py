"""The frozen base: what it is, whether it is whole, and how it is loaded and called."""
