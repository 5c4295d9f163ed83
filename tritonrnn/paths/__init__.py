"""The paths in torch, each with one way to run a layer.

``inplace`` overwrites the drive and keeps no graph. ``composite`` lets autograd record every step.
``aten`` calls torch's own kernels.
"""
