"""Try features on torch.nn.RNN and on tritonrnn: the README's table.

To add a row, write a probe under ``@feature`` in the module of its subject. A probe returns None
if the feature works, and raises if it does not.
"""
