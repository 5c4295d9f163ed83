"""Turn each instruction of a program into a function that executes it for a whole CTA."""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tests.support.ptxsim import matrix
from tests.support.ptxsim.memory import Access, EmulationError, SharedMemory
from tests.support.ptxsim.ptx import Address, Instruction, Operand, Program, Unsupported, names
from tests.support.ptxsim.scalar import (
    BITS,
    INTEGERS,
    UNSIGNED,
    Array,
    columns,
    scalar,
)

if TYPE_CHECKING:
    from tests.support.ptxsim.machine import CTA

WARP = 32
# Which threads execute: None for all of a CTA.
Mask = Array | None
Run = Callable[["CTA", Mask], None]
# What all threads of a warp execute together, and what all threads of a CTA (though of some of it
# single warps might).
OF_WARPS = ("shfl", "mma")
OF_CTAS = ("bar", "fence", "ldmatrix", "stmatrix", "wgmma")


class Step(NamedTuple):
    """An instruction, and the function that executes it for threads of a CTA."""

    instruction: Instruction
    run: Run
    # How many threads must execute it together: 1, those of a warp, or 0 for all.
    together: int
    # The slot of its predicate, and whether that is negated.
    guard: tuple[int, bool] | None
    # The slots of all registers that it mentions.
    registers: frozenset[int]
    # Of these, the operands of wgmma that it writes, before whose use a wgmma.fence must come.
    overwrites: frozenset[int]


class Product(NamedTuple):
    """An MMA in flight: its registers, and the granules that it reads."""

    instruction: Instruction
    registers: frozenset[int]
    accumulators: frozenset[int]
    granules: list[Array]


class Kernel:
    """A program whose instructions are functions.

    Args:
        program: what is translated.
        truncates: whether MMAs truncate their sums, as tensor cores do.

    Raises:
        Unsupported: the emulator does not know one of its instructions.
    """

    def __init__(self, program: Program, truncates: bool = False):
        self.program, self.truncates = program, truncates
        # Where a register's elements are in ``CTA.registers``; constants and special registers, as
        # many as are used, come after all registers.
        self.slots = {name: i for i, name in enumerate(program.register_types)}
        self.types = [UNSIGNED[BITS[kind]] for kind in program.register_types.values()]
        self.constants: dict[tuple[str | int, int], int] = {}
        instructions = [i for block in program.blocks for i in block.instructions]
        of_bytes = any(i.op[0] in ("ld", "st") and i.op[-1][1:] == "8" for i in instructions)
        self.grain = 1 if of_bytes else 2
        # Lines of all instructions, and of those that any thread has executed.
        self.lines = {instruction.line for instruction in instructions}
        self.executed: set[int] = set()
        self._of_wgmma: set[str] = set().union(
            *(names(x) for i in instructions if _is_wgmma(i) for x in i.operands[:2])
        )
        self.blocks = [[self._step(i) for i in block.instructions] for block in program.blocks]

    def _step(self, ins: Instruction) -> Step:
        def slots(registers: Set[str]) -> frozenset[int]:
            return frozenset(self.slots[name] for name in registers if name in self.slots)

        root = ins.op[0]
        writes = root not in ("wgmma", "st", "stmatrix", "bar", "fence", "cp")
        written = names(ins.operands[0]) if writes else set()
        of_ctas = root in OF_CTAS or ins.op[2:] in (("commit_group",), ("wait_group",))
        together = WARP if root in OF_WARPS else 0 if of_ctas else 1
        guard = (self.slots[ins.guard[0]], ins.guard[1]) if ins.guard else None
        overwrites = slots(written & self._of_wgmma)
        return Step(ins, self._translate(ins), together, guard, slots(ins.registers), overwrites)

    def slot(self, operand: Operand, kind: str) -> int:
        """Return where the elements of an operand of a type are."""
        if not isinstance(operand, str):
            raise Unsupported(f"operand {operand}")
        if operand in self.slots:
            return self.slots[operand]
        width = BITS[kind]
        value: str | int = operand
        if operand == "global_smem":
            value = SharedMemory.BASE
        elif operand[0] != "%":
            text = operand.rstrip("U")
            value = int(text[2:], 16) if text[:2] in ("0f", "0F") else int(text, 0)
            value %= 1 << width
        return self.constants.setdefault((value, width), len(self.slots) + len(self.constants))

    def _slots(self, operand: Operand, kind: str = "b32") -> list[int]:
        return [self.slot(item, kind) for item in _items(operand)]

    def _translate(self, ins: Instruction) -> Run:
        special = getattr(self, f"_{ins.op[0]}", None)
        if special is not None:
            return special(ins)
        functions, kind, kinds = scalar(ins.op)
        targets = self._slots(ins.operands[0])
        sources = [self.slot(x, k) for x, k in zip(ins.operands[1:], kinds, strict=True)]
        results, width = list(zip(targets, functions, strict=True)), UNSIGNED[BITS[kind]]

        def run(cta: CTA, mask: Mask) -> None:
            registers = cta.registers
            values = [registers[i] for i in sources]
            for target, function in results:
                cta.put(target, function(*values).view(width), mask)

        return run

    def _mov(self, ins: Instruction) -> Run:
        to, source = map(_items, ins.operands)
        kind = ins.op[1]
        if len(ins.op) != 2 or kind not in INTEGERS | {"pred", "f32"}:
            raise Unsupported(str(ins))
        # A word's parts, the lowest first; one to "_" is dropped.
        part, width = BITS[kind] // len(to), BITS[kind] // len(source)
        targets = [(self.slots[x], part * i) for i, x in enumerate(to) if x != "_"]
        sources = [self.slot(x, f"b{width}" if len(source) > 1 else kind) for x in source]
        whole = UNSIGNED[BITS[kind]]

        def run(cta: CTA, mask: Mask) -> None:
            word = cta.registers[sources[0]]
            if len(sources) > 1:
                word = np.zeros(1, whole)
                for i, slot in enumerate(sources):
                    value = cta.registers[slot]
                    if value is None:
                        # LLVM packs what is anything beside a part that is needed, and drops it
                        # again. Used all the same, it is NaN.
                        value = np.full(1, 2**width - 1, UNSIGNED[width])
                    word = word | value.astype(whole) << whole(width * i)
            for target, shift in targets:
                value = (word >> whole(shift)).astype(UNSIGNED[part]) if len(to) > 1 else word
                cta.put(target, value, mask)

        return run

    # Memory.

    def _address(self, operand: Operand) -> Callable[[CTA, Array], Array]:
        assert isinstance(operand, Address)
        width = 64 if operand.base[:3] == "%rd" else 32
        slot = self.slot(operand.base, f"b{width}")
        offset = UNSIGNED[width](operand.offset % (1 << width))
        return lambda cta, threads: cta.full(slot)[threads] + offset

    def _ld(self, ins: Instruction) -> Run:
        kind, targets = ins.op[-1], self._slots(ins.operands[0])
        if ins.op[1] == "param":
            return self._ld_param(ins, targets[0])
        address = self._address(ins.operands[1])
        modifiers = set(ins.op[1:-1]) - {f"v{len(targets)}"}
        spins = modifiers - {"acquire", "relaxed"} == {"gpu", "global"} and kind[1:] == "32"
        spaces = [{"shared"}] if kind == "b8" else [{"shared"}, {"global"}, {"global", "cg"}]
        if spins:
            spaces = [modifiers]
        if kind not in INTEGERS | {"f32", "b8"} or modifiers not in spaces:
            raise Unsupported(str(ins))
        width, size = UNSIGNED[BITS[kind]], BITS[kind] // 8 * len(targets)
        # In a wider register zeros come before it.
        extends = kind[0] in "bu" and self.types[targets[0]](0).nbytes > BITS[kind] // 8

        def run(cta: CTA, mask: Mask) -> None:
            threads = cta.active(mask)
            at = address(cta, threads)
            if "shared" in modifiers:
                data = cta.shared.load(_shared(cta, ins, threads, at, size))
            elif spins:
                data = cta.memory.spin(cta, ins, threads, at, "acquire" in modifiers)[:, None]
                cta.pause = "spin"
            else:
                data = cta.memory.load(cta, ins, threads, at, size, "cg" not in modifiers)
            data = np.ascontiguousarray(data).view(width)
            for i, target in enumerate(targets):
                value = data[:, i].astype(self.types[target]) if extends else data[:, i]
                cta.put_active(target, value, threads, mask)

        return run

    def _ld_param(self, ins: Instruction, target: int) -> Run:
        source = ins.operands[1]
        assert isinstance(source, Address)
        if source.offset:
            raise Unsupported(str(ins))
        number, kind = self.program.parameters.index(source.base), self.types[target]
        width, wide = BITS[ins.op[-1]], 8 * np.dtype(kind).itemsize

        def run(cta: CTA, mask: Mask) -> None:
            value = cta.arguments[number] % (1 << width)
            if ins.op[-1][0] == "s" and value >> width - 1:
                value -= 1 << width
            cta.put(target, np.array([value % (1 << wide)], kind), mask)

        return run

    def _atom(self, ins: Instruction) -> Run:
        if set(ins.op[1:]) - {"release", "relaxed"} != {"global", "gpu", "add", "u32"}:
            raise Unsupported(str(ins))
        (target,) = self._slots(ins.operands[0])
        address, addend = self._address(ins.operands[1]), self.slot(ins.operands[2], "u32")

        def run(cta: CTA, mask: Mask) -> None:
            threads = cta.active(mask)
            old = np.empty(len(threads), np.uint32)
            for i, at in enumerate(address(cta, threads)):
                word = cta.memory.word(int(at), ins)
                if "release" in ins.op:
                    cta.memory.release(cta, int(at))
                old[i] = word[0]
                word += cta.full(addend)[threads[i]]
                cta.memory.memory.changes += 1
            cta.put_active(target, old, threads, mask)
            cta.pause = "atomic"

        return run

    def _st(self, ins: Instruction) -> Run:
        kind, sources = ins.op[-1], self._slots(ins.operands[1], ins.op[-1])
        modifiers = set(ins.op[1:-1]) - {f"v{len(sources)}"}
        spaces = [{"shared"}] if kind == "b8" else [{"shared"}, {"global"}]
        if kind not in INTEGERS | {"f32", "b8"} or modifiers not in spaces:
            raise Unsupported(str(ins))
        width, size = UNSIGNED[BITS[kind]], BITS[kind] // 8 * len(sources)
        address = self._address(ins.operands[0])

        def run(cta: CTA, mask: Mask) -> None:
            threads = cta.active(mask)
            at = address(cta, threads)
            data = columns([cta.full(s)[threads] for s in sources]).astype(width)
            if "shared" in modifiers:
                cta.shared.store(_shared(cta, ins, threads, at, size), data)
            else:
                cta.memory.store(cta, ins, threads, at, data.view(np.uint16))

        return run

    def _cp(self, ins: Instruction) -> Run:
        if ins.op == ("cp", "async", "commit_group"):
            return lambda cta, mask: cta.copies.commit()
        if ins.op == ("cp", "async", "wait_group"):
            in_flight = _integer(ins.operands[0])
            return lambda cta, mask: cta.wait_for_copies(in_flight)
        if ins.op not in [("cp", "async", cache, "shared", "global") for cache in ("ca", "cg")]:
            raise Unsupported(str(ins))
        to, source = self._address(ins.operands[0]), self._address(ins.operands[1])
        size, through_l1 = _integer(ins.operands[2]), "ca" in ins.op
        if size not in ((4, 8, 16) if through_l1 else (16,)):
            raise EmulationError(f"cp.async of {size} bytes: {ins}")
        wanted = self.slot(ins.operands[3] if len(ins.operands) > 3 else str(size), "u32")

        def run(cta: CTA, mask: Mask) -> None:
            threads = cta.active(mask)
            access = _shared(cta, ins, threads, to(cta, threads), size)
            counts = cta.full(wanted)[threads]
            if ((counts != 0) & (counts != size)).any():
                raise Unsupported(f"part of a copy: {ins}")
            cta.shared.begin_copy(access)
            # The others' granules are filled with zeros.
            copied = np.flatnonzero(counts)
            at = source(cta, threads[copied])

            def read() -> Array:
                data = np.zeros((len(threads), size // 2), np.uint16)
                if len(copied):
                    readers = threads[copied]
                    data[copied] = cta.memory.load(cta, ins, readers, at, size, through_l1)
                return data

            cta.copies.open.append((access, read(), read))

        return run

    # Barriers and fences.

    def _bar(self, ins: Instruction) -> Run:
        if ins.op == ("bar", "warp", "sync"):
            return lambda cta, mask: cta.warp_barrier()
        if ins.op != ("bar", "sync") or len(ins.operands) != 1:
            raise Unsupported(str(ins))
        return lambda cta, mask: cta.barrier()

    def _fence(self, ins: Instruction) -> Run:
        if ins.op[:3] != ("fence", "proxy", "async"):
            raise Unsupported(str(ins))
        return lambda cta, mask: cta.proxy_fence()

    # Between the lanes of a warp.

    def _shfl(self, ins: Instruction) -> Run:
        how = ins.op[2:] in (("bfly", "b32"), ("idx", "b32"))
        if ins.op[1] != "sync" or not how or ins.operands[3:] != ("31", "-1"):
            raise Unsupported(str(ins))
        target, source, by = (self.slot(x, "b32") for x in ins.operands[:3])

        def run(cta: CTA, mask: Mask) -> None:
            lane, other = np.arange(cta.threads), cta.full(by).astype(np.int64)
            if ins.op[2] == "bfly":
                other = lane % WARP ^ other
            cta.put(target, cta.full(source)[lane // WARP * WARP + other % WARP], mask)

        return run

    # Matrices.

    def _ldmatrix(self, ins: Instruction) -> Run:
        count, transposed = _matrices(ins)
        targets, address = self._slots(ins.operands[0]), self._address(ins.operands[1])

        def run(cta: CTA, mask: Mask) -> None:
            threads = cta.active(None).reshape(-1, WARP)[:, : 8 * count].reshape(-1)
            access = _shared(cta, ins, threads, address(cta, threads), 16)
            words = np.ascontiguousarray(cta.shared.load(access)).view(np.uint16)
            words = words.reshape(-1, count, 8, 8)
            for target, word in zip(targets, matrix.load_matrix(words, transposed), strict=True):
                cta.put(target, word, mask)

        return run

    def _stmatrix(self, ins: Instruction) -> Run:
        count, transposed = _matrices(ins)
        sources, address = self._slots(ins.operands[1]), self._address(ins.operands[0])

        def run(cta: CTA, mask: Mask) -> None:
            threads = cta.active(None).reshape(-1, WARP)[:, : 8 * count].reshape(-1)
            access = _shared(cta, ins, threads, address(cta, threads), 16)
            words = matrix.store_matrix([cta.full(s) for s in sources], transposed)
            cta.shared.store(access, words.reshape(-1, 8))

        return run

    def _mma(self, ins: Instruction) -> Run:
        kind = ins.op[-2]
        shape = {"tf32": "m16n8k8", "bf16": "m16n8k16", "f16": "m16n8k16"}.get(kind, "")
        if ins.op[1:] != ("sync", "aligned", shape, "row", "col", "f32", kind, kind, "f32"):
            raise Unsupported(str(ins))
        to, a, b, c = map(self._slots, ins.operands)

        def run(cta: CTA, mask: Mask) -> None:
            left = matrix.left_fragment([cta.full(s) for s in a], kind)
            right = matrix.right_fragment([cta.full(s) for s in b], kind)
            z = matrix.accumulator([cta.full(s) for s in c])
            z = matrix.product(left, right, z, self.truncates)
            for target, word in zip(to, matrix.accumulator_registers(z), strict=True):
                cta.put(target, word, mask)

        return run

    def _wgmma(self, ins: Instruction) -> Run:
        if ins.op[1] == "fence":
            return lambda cta, mask: cta.wgmma_fence()
        if ins.op[1] == "commit_group":
            return lambda cta, mask: cta.products.commit()
        if ins.op[1] == "wait_group":
            in_flight = _integer(ins.operands[0])
            return lambda cta, mask: cta.wait_for_products(in_flight)
        kind, d = ins.op[-1], self._slots(ins.operands[0])
        n, k, size = 2 * len(d), *((8, 4) if kind == "tf32" else (16, 2))
        if ins.op[1:] != ("mma_async", "sync", "aligned", f"m64n{n}k{k}", "f32", kind, kind):
            raise Unsupported(str(ins))
        in_registers = isinstance(ins.operands[1], tuple)
        a, (b,) = self._slots(ins.operands[1]), self._slots(ins.operands[2])
        scale_d = self.slot(ins.operands[3], "pred")
        scale_a, scale_b, *transposed = map(_integer, ins.operands[4:])
        # Which of the operands in shared memory are not k-major: only 16-bit ones may be.
        of_16_bits = 1 if in_registers else 2
        if (scale_a, scale_b, len(transposed)) != (1, 1, 0 if kind == "tf32" else of_16_bits):
            raise Unsupported(str(ins))
        a_by_k, b_by_k = ([True, True] + [not flag for flag in transposed])[-2:]
        registers = frozenset(d + a if in_registers else d)

        def read(cta: CTA, slot: int, mn: int, k_major: bool, granules: list[Array]) -> Array:
            by_group = cta.full(slot).reshape(-1, 4 * WARP)
            if (by_group != by_group[:, :1]).any():
                raise EmulationError(f"a descriptor differs in a warp group: {ins}")
            offsets = np.stack(
                [matrix.operand_offsets(int(x), mn, k, size, k_major) for x in by_group[:, 0]]
            )
            grain = self.grain
            some = (offsets - cta.shared.BASE)[..., None] // grain + np.arange(size // grain)
            granules.append(some)
            access = Access(cta, ins, cta.active(None), some)
            words = np.ascontiguousarray(cta.shared.begin_product(access))
            return matrix.values(words.view(UNSIGNED[8 * size])[..., 0], kind)

        def run(cta: CTA, mask: Mask) -> None:
            granules: list[Array] = []
            cta.begin_product(Product(ins, registers, frozenset(d), granules))
            if in_registers:
                m = matrix.left_fragment([cta.full(s) for s in a], kind).reshape(-1, 64, k)
            else:
                m = read(cta, a[0], 64, a_by_k, granules)
            s = read(cta, b, n, b_by_k, granules)
            adds = cta.registers[scale_d]
            if adds.any() != adds.all():
                raise EmulationError(f"scale-d differs between threads: {ins}")
            z = np.zeros((1, 64, n))
            if adds.all():
                z = matrix.accumulator([cta.full(r) for r in d]).reshape(-1, 64, n)
            z = matrix.product(m, s.swapaxes(1, 2), z, self.truncates)
            words = matrix.accumulator_registers(z.reshape(-1, 16, n))
            for target, word in zip(d, words, strict=True):
                cta.registers[target] = word

        return run


def _shared(cta: CTA, ins: Instruction, threads: Array, address: Array, size: int) -> Access:
    return Access(cta, ins, threads, cta.shared.granules(address, size, ins))


def _items(operand: Operand) -> tuple[str, ...]:
    if isinstance(operand, Address):
        raise Unsupported(f"operand {operand}")
    return (operand,) if isinstance(operand, str) else operand


def _integer(operand: Operand) -> int:
    assert isinstance(operand, str)
    return int(operand, 0)


def _is_wgmma(ins: Instruction) -> bool:
    return ins.op[:2] == ("wgmma", "mma_async")


def _matrices(ins: Instruction) -> tuple[int, bool]:
    """Return how many matrices ``ldmatrix`` or ``stmatrix`` moves, and whether it transposes."""
    rest = [part for part in ins.op[5:] if part != "trans"]
    if ins.op[1:4] != ("sync", "aligned", "m8n8") or rest != ["shared", "b16"]:
        raise Unsupported(str(ins))
    return int(ins.op[4][1:]), "trans" in ins.op
