"""Benchmarks: workloads, a load generator over gRPC, and reports in vLLM's terms."""
