"""Architecture presets: the shapes of public models, one TOML file each.

Read with `jaxserve.models.config_readers.from_preset`; keys are the fields of `ModelConfig`,
and `sliding_pattern = n` beside one `sliding_window` lets every n-th layer attend fully.
"""
