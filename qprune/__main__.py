"""python -m qprune: the command line."""

from qprune.cli import main

main()
