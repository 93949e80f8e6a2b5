"""Files that other tools run."""
