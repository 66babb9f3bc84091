"""Who owns which KV page. Host-side only: knows page numbers, never arrays (no JAX)."""

from jaxserve.cache.page_pool import PagePool

__all__ = ["PagePool"]
