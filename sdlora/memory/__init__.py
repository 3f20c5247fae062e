"""What a run needs in memory and time, before a weight is loaded, and what it really takes."""
