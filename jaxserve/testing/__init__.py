"""Stand-ins for tests of jaxserve and of programs that use it; nothing here imports JAX."""
