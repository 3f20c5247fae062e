"""LoRA files of every dialect, read and written."""
