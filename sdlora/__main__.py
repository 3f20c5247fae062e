"""`python -m sdlora` is `sdlora`."""

from sdlora.cli import main

main()
