"""Measurements of tritonrnn against its peers: run ``python -m perf`` from a checkout."""
