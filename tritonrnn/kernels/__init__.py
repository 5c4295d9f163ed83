"""The recurrence of a layer in Triton: one kernel a plan, the plans, their launch; see README.md.

Import this package only where Triton is to be used: the rest of tritonrnn works without it.
"""
