"""The frozen base: what it is, whether it is whole, and how it is loaded and called."""

import logging

# diffusers imports bitsandbytes wherever it is installed, and that advises every owner of a newer CPU to
# install a package for inference kernels, which training cannot use.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
