"""List the peers that are measured, by name, and the default ones of each device.

A peer of your own is named ``module:Class``; see :class:`perf.peers.peer.Peer` for what it needs.
"""

from __future__ import annotations

import importlib
from functools import partial

import tritonrnn
from perf.peers.flash import FlashRNN
from perf.peers.loops import CompiledLoop, GraphedLoop, Loop
from perf.peers.ours import Forced, Ours
from perf.peers.peer import Peer, Runner
from perf.peers.torch_rnn import NN, cudnn_off
from tritonrnn.kernels.plan import PLANS

__all__ = ["BASELINE", "OURS", "PEERS", "Peer", "Runner", "baseline", "defaults", "find"]

PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Ours("tritonrnn"),
        Ours("tritonrnn-torch", partial(tritonrnn.backend, "torch")),
        *(Forced(plan) for plan in PLANS),
        NN("nn_cudnn", "cuda"),
        NN("nn_aten", "cpu"),
        # Its speedup over nn.RNN, which is the same, is the noise.
        NN("nn_again"),
        NN("nn_no_cudnn", "cuda", cudnn_off),
        Loop(),
        CompiledLoop(),
        GraphedLoop(),
        # All steps in one launch, or a product and a pointwise kernel for each.
        FlashRNN("flashrnn", "cuda_fused"),
        FlashRNN("flashrnn-alternating", "cuda"),
    )
}

# tritonrnn as a user gets it: the subject of every comparison.
OURS = "tritonrnn"
# nn.RNN at its default on each device; every speedup is relative to it.
BASELINE = {"cpu": "nn_aten", "cuda": "nn_cudnn"}
_ON_CPU = ("tritonrnn", "nn_aten", "nn_again", "loop")
_ON_GPU = tuple(name for name in PEERS if name != "nn_aten")


def baseline(device: str) -> str:
    """Return the name of ``nn.RNN`` at its default on a device."""
    return BASELINE[device.split(":")[0]]


def defaults(device: str) -> tuple[str, ...]:
    """Return the default peers of a run on a device."""
    return _ON_CPU if device == "cpu" else _ON_GPU


def find(name: str) -> Peer:
    """Return a peer by its name, or by ``module:Class``.

    Raises:
        ValueError: there is no peer of this name.
    """
    if name in PEERS:
        return PEERS[name]
    module, _, attribute = name.partition(":")
    if not attribute:
        raise ValueError(f"Expected a peer of {', '.join(PEERS)}, or module:Class, got {name!r}")
    try:
        return getattr(importlib.import_module(module), attribute)()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"There is no peer {name!r}: {error}") from error
