"""Other engines on the same work: each peer is a script of its own, run in a fresh process."""
