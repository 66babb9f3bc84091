"""One file per family of models; `jaxserve.models.registry` lists them."""
