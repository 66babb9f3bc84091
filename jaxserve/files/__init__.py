"""Files on this machine: where they are kept, who may write them, and GGUF's header. No JAX."""
