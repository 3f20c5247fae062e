"""Images from a base and an adapter: one way for samples in training and for `sdlora sample`."""
