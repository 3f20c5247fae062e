"""The built-in base: weights trained from scratch on emoji drawings, and the scripts that made them."""
