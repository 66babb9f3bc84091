"""The Open Inference Protocol, version 2, as spoken by KServe, Triton and their clients."""
