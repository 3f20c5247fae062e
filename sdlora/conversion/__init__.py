"""Between adapters and whole bases: a LoRA out of a fine-tuned base, and a base with a LoRA inside."""
