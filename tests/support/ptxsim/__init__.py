"""Execute on a CPU the PTX that Triton compiles, and check its results and its memory accesses."""
