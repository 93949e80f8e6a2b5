"""Runs that can be stopped at any time, or lose their process, and go on as if nothing had been."""
