"""Kernels for paged KV caches. One folder per kernel; this package imports JAX, never jaxserve."""
