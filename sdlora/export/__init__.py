"""Files for other programs, and the proof that they load."""
