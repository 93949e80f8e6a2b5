"""The commands of the command line, one file each; qprune/cli.py puts them together."""
