"""The engine: the loop that joins scheduler and executor, and what it says to its callers."""
