"""Custom calls of XLA:CPU written in Python: Numba compiles them, XLA's own threads run them.

Pallas has no CPU backend. What XLA:CPU cannot fuse, such as reading KV pages where they lie, is
here a function over raw memory that XLA's foreign function interface calls.
"""
