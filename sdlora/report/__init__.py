"""Images and words about a run, made from its events alone."""
