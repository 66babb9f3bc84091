"""Reading, converting and fetching model weights (see `load.open_checkpoint`)."""
