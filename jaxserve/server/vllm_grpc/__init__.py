"""The gRPC protocol of vLLM's engine, for the gateways that drive one through it."""
