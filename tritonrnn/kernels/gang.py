"""How the programs of a gang wait for one another: counters that only grow.

A gang is the programs that walk the same sequences of one group, each with other hidden units. In
every step each of them publishes its slice of the state, and reads all slices in the next. There is
a counter for each of the one or two batch blocks that they walk by turns:

    publish   store the slice        every thread
              barrier                ... all stores of the block are before
              add 1, release         one thread
    wait      poll, acquire          every thread, until the whole gang has added
              barrier
              read the state         from L2: L1 may hold what was there before

A counter is never reset, for who resets it may undo an addition. It counts modulo 2³².

No schedule can deadlock. All programs of a launch run at the same time, or the driver refuses it
(a cooperative launch). All of a gang take the same turns in the same order, for which sequences
there are and how long they are is the same for all, and a program waits only for additions that
others make in earlier turns: of those that wait, one that is in the earliest turn has all it waits
for, or waits for one that runs. No gang waits for another one. And should a program fail, those
that wait for it lose patience, say so and run to the end without waiting any more: a walk ends
whatever happens.

Patience is a number of polls, not a time. A poll is a round trip to L2, of half a microsecond or
so, and a program polls only while it runs: neither a debugger nor another process on the GPU wears
its patience out, as they would a clock's. And it means the same in Triton's interpreter.
"""

import triton
import triton.language as tl


@triton.jit
def publish(counter_ptr):
    """Let the gang read what every thread of this program has stored."""
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")


@triton.jit
def wait(counter_ptr, target, patience, INTERPRETED: tl.constexpr):
    """Return when the counter has reached target, or else after ``patience`` polls.

    Gives the patience that is left for the next time: all or, after a wait in vain, none.
    """
    polls = patience
    missing = target - poll(counter_ptr, INTERPRETED)
    while (missing > 0) & (polls > 0):
        missing = target - poll(counter_ptr, INTERPRETED)
        polls -= 1
    tl.debug_barrier()
    return tl.where(missing > 0, 0, patience)


@triton.jit
def poll(counter_ptr, INTERPRETED: tl.constexpr):
    """Read the counter with acquire semantics, each thread for itself."""
    if INTERPRETED:
        return tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    else:
        # Triton has no load that acquires, and its atomics on one number pass the result from one
        # thread to all others through shared memory: two barriers a poll.
        return tl.inline_asm_elementwise(
            "ld.acquire.gpu.global.s32 $0, [$1];",
            "=r,l",
            [counter_ptr],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
