"""Protocol version 1: `jaxserve.proto` and the code that protoc generates from it."""
