"""The gRPC front end: protocol, servicers, health, metrics. Never imports JAX."""
