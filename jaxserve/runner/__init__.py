"""Runs step plans on a device mesh: buckets, packing, programs, sampling, compilation."""
