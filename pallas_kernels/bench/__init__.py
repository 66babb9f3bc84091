"""Times the kernels beside other implementations: `python -m pallas_kernels.bench`."""
