"""`python -m flashformer` is the command `flashformer`."""

from .cli import main

main()
