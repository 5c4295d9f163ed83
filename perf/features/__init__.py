"""What works, tried on torch.nn.RNN and on tritonrnn: the README's table.

To add a row, write a probe under ``@feature`` in the module that it belongs to. A probe returns
None where it worked, and raises where it did not.
"""
