"""Is this machine, and are these nodes, fit to train? See __main__.py."""
