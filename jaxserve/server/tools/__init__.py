"""Tool calling: what callers offer, how models write calls, and how answers are read."""
