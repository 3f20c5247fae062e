"""Low-rank adapters for any network: plain data, the layers that carry them, and their files."""
