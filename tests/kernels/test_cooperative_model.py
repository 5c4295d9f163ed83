"""The barrier of a CTA group as a small model, every state of which is visited.

The emulator runs some schedules of the compiled kernel; this covers every interleaving, with the
faults that a weakly ordered memory makes. Each thread block has store buffers, which empty in any
order, and an L1 that keeps what it once held. So the model has

    store     into the buffer of the thread that stores; it may reach L2 at any later time
    barrier   makes the thread that releases answer for the stores of the others, too
    release   the addition waits until what its thread answers for is in L2; with no barrier, that
              is its own stores only
    acquire   the poll reads L2
    read      .cg reads L2; without it, L1 gives the line as it was fetched before, if it was

A thread block is two threads: the one that adds (0) and another one (1), each with a half of the
slice. Here only thread 0 polls, so that the barrier after the poll counts; in the kernel every
thread polls, which is more. L1 holds every line from the start, which is the worst it can do. A row
of the state is written once: a read finds that, or the drive that lay there before.

A CTA group walks its batch blocks in pairs, one pair after the other, and those of a pair
interleaved, each to its own last step. There is a counter for either block of a pair, which counts
on from pair to pair.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

STEPS = 3


@dataclass(frozen=True)
class Protocol:
    """What the kernel does, and what can be left out of it."""

    # Steps of each batch block that each CTA group walks, two by two, and programs a CTA group.
    cta_groups: tuple[tuple[int, ...], ...] = ((STEPS,),)
    programs: int = 2
    own_counters: bool = True
    targets_count_on: bool = True
    release: bool = True
    arrive_barrier: bool = True
    wait: bool = True
    wait_barrier: bool = True
    bypass_l1: bool = True
    target_off: int = 0


# A thread's place: how many steps it has walked, and what it does next.
WAIT, WAIT_BARRIER, READ, STORE, ARRIVE_BARRIER, ADD, DONE = range(7)
THREADS = 2


@dataclass(frozen=True)
class State:
    """Places of threads; rows in buffers and in L2; two counters of each CTA group.

    A row is (CTA group, program, thread, block, step): a thread's half of a program's slice.
    """

    places: tuple[tuple[int, int], ...]
    buffered: frozenset
    memory: frozenset
    counters: tuple[tuple[int, ...], ...]


class StaleReadError(Exception):
    """A read of a row that its writer's store had not reached."""


def schedule(steps: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return blocks and steps in the order in which a CTA group walks them."""
    pairs = [range(len(steps))[first : first + 2] for first in range(0, len(steps), 2)]
    return [
        (block, step)
        for pair in pairs
        for step in range(max(steps[block] for block in pair))
        for block in pair
        if step < steps[block]
    ]


def search(protocol: Protocol) -> int:
    """Visit every state, and return their number.

    Raises:
        StaleReadError: some schedule reads a row too early.
        TimeoutError: some schedule ends with a thread that waits for ever.
    """
    threads = [
        (cta_group, program, thread)
        for cta_group in range(len(protocol.cta_groups))
        for program in range(protocol.programs)
        for thread in range(THREADS)
    ]
    first = State(
        tuple((0, WAIT) for _ in threads),
        frozenset(),
        frozenset(),
        ((0, 0),) * len(protocol.cta_groups),
    )
    seen = {first}
    pending = [first]
    while pending:
        state = pending.pop()
        successors = list(_successors(protocol, threads, state))
        local = [successor for at_once, successor in successors if at_once]
        successors = local[:1] or [successor for _, successor in successors]
        if not successors and any(doing != DONE for _, doing in state.places):
            raise TimeoutError(f"nothing can happen any more: {state}")
        for successor in successors:
            if successor not in seen:
                seen.add(successor)
                pending.append(successor)
    return len(seen)


def _successors(protocol: Protocol, threads: list, state: State) -> Iterator[tuple[bool, State]]:
    """Yield each next state, and whether it concerns one thread block only: then it may come first.

    A read too: whatever is stale later was stale before.
    """
    for row in state.buffered:
        yield False, replace(state, buffered=state.buffered - {row}, memory=state.memory | {row})
    for i, (cta_group, program, thread) in enumerate(threads):
        at_step, doing = state.places[i]
        order = schedule(protocol.cta_groups[cta_group])
        block, step = order[at_step]
        counter = block % 2 if protocol.own_counters else 0
        # Steps that the counter counted before the block's first.
        before = (
            sum(protocol.cta_groups[cta_group][block % 2 : block : 2])
            if protocol.targets_count_on
            else 0
        )
        siblings = [j for j, other in enumerate(threads) if other[:2] == (cta_group, program)]

        def at(place: tuple[int, int], among: list[int], **changes) -> State:
            places = list(state.places)
            for j in among:
                places[j] = place
            return replace(state, places=tuple(places), **changes)

        if doing == WAIT:
            target = (before + step) * protocol.programs + protocol.target_off
            if not protocol.wait or thread or state.counters[cta_group][counter] >= target:
                yield (
                    bool(thread),
                    at((at_step, WAIT_BARRIER if protocol.wait_barrier else READ), [i]),
                )
        elif doing in (WAIT_BARRIER, ARRIVE_BARRIER):
            if thread == 0 and all(state.places[j] == (at_step, doing) for j in siblings):
                yield True, at((at_step, doing + 1), siblings)
        elif doing == READ:
            for other in range(protocol.programs if step else 0):
                for half in range(THREADS):
                    own = other == program and half == thread
                    row = (cta_group, other, half, block, step - 1)
                    there = protocol.bypass_l1 and row in state.memory
                    if not own and not there:
                        raise StaleReadError(f"{threads[i]} reads step {step - 1} of {other}")
            yield True, at((at_step, STORE), [i])
        elif doing == STORE:
            row = (cta_group, program, thread, block, step)
            after = ARRIVE_BARRIER if protocol.arrive_barrier else ADD
            yield True, at((at_step, after), [i], buffered=state.buffered | {row})
        elif doing == ADD:
            answers_for = siblings if protocol.arrive_barrier else [i]
            rows = {(*threads[j], block, step) for j in answers_for}
            if thread == 0 and protocol.release and rows & state.buffered:
                continue
            next_place = (at_step + 1, WAIT) if at_step + 1 < len(order) else (at_step, DONE)
            counters = [list(of_group) for of_group in state.counters]
            if thread == 0:
                counters[cta_group][counter] += 1
            after_all = tuple(map(tuple, counters))
            yield bool(thread), at(next_place, [i], counters=after_all)


@pytest.mark.parametrize(
    ("programs", "cta_groups"),
    [
        (2, ((STEPS,),)),
        (3, ((STEPS,),)),
        (2, ((2,), (1,))),
        (2, ((STEPS, STEPS),)),
        (2, ((STEPS, 1),)),
        (2, ((1, STEPS),)),
        (3, ((2, 2),)),
        (3, ((STEPS, 1),)),
        (2, ((2, 1, 2, 2),)),
        (2, ((1, 2, 2),)),
    ],
    ids=[
        "2-programs",
        "3-programs",
        "2-cta-groups-ragged",
        "2-blocks",
        "2-blocks-second-shorter",
        "2-blocks-second-longer",
        "3-programs-2-blocks",
        "3-programs-ragged",
        "4-blocks",
        "3-blocks",
    ],
)
def test_cooperative_protocol_holds_in_every_state(programs, cta_groups):
    assert search(Protocol(cta_groups, programs)) > 100


FAULTS = {
    "no-release": {"release": False},
    "no-barrier-before-release": {"arrive_barrier": False},
    "no-barrier-after-acquire": {"wait_barrier": False},
    "no-cache-bypass": {"bypass_l1": False},
    "no-wait": {"wait": False},
    "target-one-less": {"target_off": -1},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_cooperative_protocol_needs_all_its_parts(fault):
    with pytest.raises(StaleReadError):
        search(Protocol(**FAULTS[fault]))
    with pytest.raises(StaleReadError):
        search(Protocol(((2, 2),), **FAULTS[fault]))


def test_cooperative_protocol_needs_a_counter_for_each_block():
    """A program that is ahead adds for the second block what others wait for in the first."""
    with pytest.raises(StaleReadError):
        search(Protocol(((2, 2),), own_counters=False))


def test_cooperative_protocol_needs_targets_that_count_on():
    """A counter that has been counted on does not show how far a block is that has only begun."""
    with pytest.raises(StaleReadError):
        search(Protocol(((2, 2, 2, 2),), targets_count_on=False))


def test_cooperative_protocol_waits_for_ever_for_a_count_too_many():
    with pytest.raises(TimeoutError):
        search(Protocol(target_off=1))
