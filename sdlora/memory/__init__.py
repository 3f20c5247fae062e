"""How much memory a run needs, before a weight is loaded."""
