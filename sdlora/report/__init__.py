"""Pictures of a run, made from its events alone."""
