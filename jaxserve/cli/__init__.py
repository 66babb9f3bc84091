"""The `jaxserve` command: one file per sub-command, imported only when it is used."""
