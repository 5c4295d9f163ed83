"""Launch one plan on small ragged batches and nothing else, for a sanitizer or a profiler.

``compute-sanitizer --tool memcheck python -m perf.session.launches resident``
"""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import product

import torch

from tritonrnn.kernels import launch
from tritonrnn.kernels.plan import EPILOGUES, PLANS
from tritonrnn.layout import SequenceLayout
from tritonrnn.ragged import RaggedLayout

# Hidden units, no multiple of a tile; those of the cooperative plan take several programs.
HIDDEN = dict.fromkeys(PLANS, 100) | {"registers": 252, "cooperative": 200}
LAYOUTS = {
    "packed": SequenceLayout.packed([11, 9, 9, 5, 2, 1, 1], 38),
    "many": SequenceLayout.packed([60, 33, 9, 1], 103),
    "jagged": RaggedLayout.jagged(torch.tensor([0, 1, 1, 8, 10, 11, 15, 16, 16, 22, 23]), 23),
}
DTYPES = (torch.bfloat16, torch.float32)


def launch_all(name: str, device: torch.device) -> int:
    """Launch a plan for every layout, epilogue and dtype, both directions at once.

    Returns:
        The number of problems that the plan fits.

    Raises:
        ArithmeticError: a result is not finite.
    """
    launches, H, G = 0, HIDDEN[name], 2
    generator = torch.Generator().manual_seed(H)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    for layout, epilogue, dtype in product(LAYOUTS.values(), EPILOGUES, DTYPES):
        a = normal(layout.N, G * H).to(dtype)
        problem = launch.problem_of(a, layout, G=G, epilogue=epilogue, tf32=True)
        plan = PLANS[name](problem, launch.device_of(device))
        if plan is None:
            continue
        if plan.name == "cooperative":
            # One CTA group a direction, so that it takes several batch blocks: of "many", in bf16,
            # the first two interleaved, then the other two.
            plan = replace(plan, programs=G * -(-H // plan.block_h))
        # As in a layer, which overwrites the drive, but not the gradient of the output.
        s = torch.full_like(a, torch.nan) if epilogue.endswith("_grad") else a
        launch.recurrence(
            a,
            normal(G, layout.B, H),
            (normal(G, H, H) / H**0.5).to(dtype),
            normal(layout.N, G * H).tanh().to(dtype) if epilogue.endswith("_grad") else None,
            layout,
            epilogue=epilogue,
            reverse=(False, True),
            tf32=True,
            plan=plan,
            s=s,
        )
        if not bool(s.isfinite().all()):
            raise ArithmeticError(f"{plan}: not finite for {layout}, {epilogue}, {dtype}")
        launches += 1
    return launches


if __name__ == "__main__":
    count = launch_all(sys.argv[1], torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    print(f"{count} launches of the plan {sys.argv[1]}")
    # As pytest, where there is nothing to run.
    sys.exit(0 if count else 5)
