"""A covering sample of all cases: every pair of values of a few factors at least once."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import combinations, product
from typing import Any

from tests.support.ptxsim.case import CHOICES, Case

# The factors whose values all meet, those of the package's problem.
FACTORS: dict[str, Sequence[Any]] = {
    **{name: CHOICES[name] for name in ("plan", "arithmetic", "epilogue", "layout")},
    # 99 KB, two instructions of Blackwell's, and programs of 32 hidden units among them.
    "arch": ("sm_80", "sm_90", "sm_100", "sm_120"),
    "G": (1, 2),
    "v_0": (False, True),
}
# Drawn for each case. Sizes of rows that are whole vectors, words, and neither; of a cooperative
# plan most of two or three CTAs, so that little is padding.
SIZES = {
    "resident": (16, 24, 50, 64, 97, 128),
    "registers": (16, 24, 50, 64, 97, 128),
    "cooperative": (128, 136, 150, 192),
    "stepwise": (16, 50, 72, 97, 128),
}
OTHERS: dict[str, Sequence[Any]] = {
    "T": (2, 3, 4, 5, 6),
    "B": (3, 5, 9, 11, 17, 33),
    "seed": (0, 1),
    "truncates": (False, True),
}
# What a long sweep draws besides.
WIDE_SIZES = (1, 5, 17, 31, 60, 63, 72, 100, 130, 144, 200, 201, 256, 300, 320, 512)
WIDE: dict[str, Sequence[Any]] = {
    "T": (1, 2, 3, 4, 5, 6, 7, 9, 13, 21),
    "B": (1, 2, 3, 5, 7, 9, 11, 17, 33, 49),
    "G": (1, 2, 2, 5),
    "seed": tuple(range(10)),
    "gap": (0, 0, 0, 6),
    "far": (False, False, False, True),
    "poison": (False, True),
}
Pair = frozenset[tuple[str, Any]]


def pairs(values: dict[str, Any]) -> set[Pair]:
    """Return the pairs of values of factors that meet in a case."""
    facts = ((name, values[name]) for name in FACTORS)
    return set(map(frozenset, combinations(facts, 2)))


def all_pairs() -> set[Pair]:
    """Return all pairs of values that there could be."""
    facts = [[(name, value) for value in values] for name, values in FACTORS.items()]
    return {frozenset(pair) for a, b in combinations(facts, 2) for pair in product(a, b)}


def draw(chance: random.Random, wide: bool = False) -> Case | None:
    """Draw one case, from more values if ``wide``; None if its plan does not fit."""
    choices = {**FACTORS, **OTHERS, **(WIDE if wide else {})}
    values = {name: chance.choice(some) for name, some in choices.items()}
    sizes = SIZES[values["plan"]] + (WIDE_SIZES if wide else ())
    values["H"] = chance.choice(sizes)
    if values["plan"] == "cooperative":
        # Of few CTAs, one group walks several batch blocks.
        values["cta_groups"], values["B"] = chance.choice(((0, 5), (1, 17), (1, 33), (2, 33)))
    if values["H"] >= 130 and values["plan"] in ("cooperative", "stepwise"):
        # Minutes otherwise.
        values["T"] = min(values["T"], 6 if values["H"] < 300 else 3)
    if values.get("far"):
        values["far"] = (
            values["layout"] == "packed"
            and values["plan"] != "cooperative"
            and values["epilogue"] in ("tanh", "relu")
        )
    case = Case(**values)
    return case if case.launch_plan is not None else None


def sample(count: int, seed: int = 0, wide: bool = False) -> list[Case]:
    """Return cases, the same for the same seed.

    Of some draws each time the one is taken that has the most pairs of values that have not met
    before, then the most triples.
    """
    chance = random.Random(seed)
    met: set[Pair] = set()
    cases: list[Case] = []
    while len(cases) < count:
        best: tuple[tuple[int, int], Case, set[Pair]] | None = None
        for _ in range(50):
            case = draw(chance, wide)
            if case is None or case in cases:
                continue
            facts = [(name, getattr(case, name)) for name in FACTORS]
            groups = {frozenset(some) for n in (2, 3) for some in combinations(facts, n)} - met
            score = sum(len(some) == 2 for some in groups), len(groups)
            if best is None or score > best[0]:
                best = score, case, groups
        assert best is not None
        cases.append(best[1])
        met |= best[2]
    return cases
