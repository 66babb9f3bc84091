"""Model architectures: one config for all, plain layer functions, one short file per family."""
