"""A fast vanilla RNN for PyTorch: ``tritonrnn.RNN`` replaces ``torch.nn.RNN``."""

from tritonrnn import export, functional
from tritonrnn.conversion import convert
from tritonrnn.dispatch import backend
from tritonrnn.explanation import Explanation, explain, trials
from tritonrnn.modules import RNN, RNNCell

__version__ = "0.1.0"

__all__ = [
    "RNN",
    "Explanation",
    "RNNCell",
    "backend",
    "convert",
    "explain",
    "export",
    "functional",
    "trials",
]
