"""The paths in torch.

``inplace`` runs the recurrence alone, in place and without a graph. ``composite`` runs a layer in
operations that autograd records. ``aten`` runs layers in torch's own kernels.
"""
