"""The paths that need no Triton: each runs a layer on torch alone."""
