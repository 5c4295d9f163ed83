"""A barrier between the thread blocks (CTAs) of a CTA group: counters that only grow.

A CTA group is the programs that share a batch block of one group of hidden units, each with other
hidden units. In every step each of them stores its slice of the state, and reads all slices in the
next step. Each batch block that is walked at the same time has a counter:

    arrive    store the slice        every thread
              block barrier          ... all stores of the program come before
              add 1, release         one thread
    wait      poll, acquire          every thread, until the whole CTA group has added
              block barrier
              read the state         from L2: L1 may hold what was there before

A counter is never reset, as a reset might undo an addition. It counts modulo 2³².

No schedule can deadlock. All programs of a launch run at the same time, or the driver refuses it
(a cooperative launch). All programs of a CTA group walk the same steps of the same batch blocks in
the same order, as all of them see the same lengths, and a program waits only for additions that
others make in earlier steps. So of those that wait, one in the earliest step has all it waits for,
or waits for one that runs. No CTA group waits for another one. And should a program fail, those
that wait for it give up after max_spins polls, say so, and run to the end without waiting any more:
a walk ends whatever happens.

The limit is a number of polls, not a time. A poll is a round trip to L2, and a program polls only
while it runs: neither a debugger nor another process on the GPU uses
up its polls, as they would use up a time. And it means the same in Triton's interpreter.
"""

import triton
import triton.language as tl


@triton.jit
def arrive(counter_ptr):
    """Let the CTA group read what every thread of this program has stored."""
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")


@triton.jit
def wait(counter_ptr, target, max_spins, C: tl.constexpr):
    """Return when the counter has reached target, or else after max_spins polls.

    Returns max_spins for the next wait: the same, or 0 after one that timed out.
    """
    spins = max_spins
    missing = target - poll(counter_ptr, C)
    while (missing > 0) & (spins > 0):
        missing = target - poll(counter_ptr, C)
        spins -= 1
    tl.debug_barrier()
    return tl.where(missing > 0, 0, max_spins)


@triton.jit
def poll(counter_ptr, C: tl.constexpr):
    """Read the counter with acquire semantics, each thread for itself."""
    if C.INTERPRETED:
        return tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    else:
        # Triton has no acquire load, and its scalar atomics hand the result from one thread to
        # all others through shared memory: two block barriers a poll.
        return tl.inline_asm_elementwise(
            "ld.acquire.gpu.global.s32 $0, [$1];",
            "=r,l",
            [counter_ptr],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
