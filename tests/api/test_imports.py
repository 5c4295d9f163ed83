"""Who imports whom: downwards only, Triton when it is used, the benchmarks never."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import tritonrnn
from tests.support.processes import run_alone

PACKAGE = Path(tritonrnn.__file__).parent
TESTS = Path(__file__).parents[1]
# From the top down. A module imports from those below it.
LEVELS = [
    {"tritonrnn"},
    {"conversion", "explanation", "export", "onnx"},
    {"modules"},
    {"functional"},
    {"validation"},
    {"ops"},
    {"dispatch", "flops"},
    {"autotune.__init__"},
    {"autotune.tuner"},
    {"autotune.calls", "autotune.timing"},
    {"autotune.verification"},
    {"autotune.bench"},
    {"autotune.store"},
    {"autotune.records"},
    {"paths.aten"},
    {"paths.composite", "paths.onnx"},
    {"layer"},
    {"paths.inplace"},
    {"paths.__init__"},
    {"ragged"},
    {"layout"},
    {"environment", "memo", "nested", "precision"},
]
# Only where Triton is to be used.
WITH_TRITON = ("kernels", "autotune")
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
SOURCES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imports_of(path: Path) -> list[tuple[str, bool]]:
    """Return the dotted name of each import, and whether it runs when the module is imported."""
    tree = ast.parse(path.read_text())
    at_once = set()
    pending = [tree]
    while pending:
        node = pending.pop()
        at_once.add(node)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                pending.append(child)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node in at_once) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [(name, node in at_once) for name in names]
    return found


def own_module(name: str) -> str | None:
    """Return the module of the package that a dotted import reaches, as SOURCES has it."""
    if name.split(".")[0] != "tritonrnn":
        return None
    parts = name.split(".")[1:]
    for end in range(len(parts), 0, -1):
        for candidate in (".".join(parts[:end]), ".".join([*parts[:end], "__init__"])):
            if candidate in SOURCES:
                return candidate
    return "__init__"


def test_sources_are_found():
    assert {"__init__", "modules", "functional", "dispatch", "ops", "layout"} <= set(SOURCES)


@pytest.mark.parametrize("source", [s for s in SOURCES if not s.startswith("kernels")])
def test_imports_run_downwards_only(source):
    def level(module):
        return LEVEL["tritonrnn" if module == "__init__" else module]

    for name, at_once in imports_of(SOURCES[source]):
        target = own_module(name)
        if target is None:
            continue
        if target.startswith(WITH_TRITON) and not source.startswith(WITH_TRITON):
            assert not at_once, f"{source} imports {name} before it is to be used"
        if not target.startswith("kernels"):
            assert level(target) > level(source), f"{source} imports {name} from above"


@pytest.mark.parametrize("source", [s for s in SOURCES if s.startswith("kernels")] or ["layout"])
def test_kernels_know_the_layout_only(source):
    for name, _ in imports_of(SOURCES[source]):
        target = own_module(name)
        assert target is None or target.startswith("kernels") or target == "layout", name


def test_no_module_imports_itself_through_others():
    graph = {
        source: {own_module(name) for name, _ in imports_of(path)} - {None, source, "__init__"}
        for source, path in SOURCES.items()
    }
    assert list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("source", SOURCES)
def test_nothing_imports_perf_or_triton_at_once(source):
    for name, at_once in imports_of(SOURCES[source]):
        root = name.split(".")[0]
        assert root not in ("perf", "tests"), f"{source} imports {name}"
        if not source.startswith(WITH_TRITON):
            assert root != "triton" or not at_once, f"{source} imports {name}"


def test_readme_maps_every_module_from_the_top_down():
    table = (TESTS.parent / "README.md").read_text().split("| file | what it holds |")[1]
    rows = [row.split("|")[1] for row in table.split("\n\n")[0].splitlines()[2:]]
    names = [
        name.replace("/", ".").strip(".") for row in rows for name in re.findall(r"`(.*?)`", row)
    ]
    # A folder stands where its __init__ does.
    levels = [LEVEL.get(name, LEVEL.get(f"{name}.__init__")) for name in names if name != "kernels"]
    assert levels == sorted(levels)
    folders = ("kernels", "autotune")
    modules = {name for name in SOURCES if not name.endswith("__init__")}
    assert set(names) == {name for name in modules if not name.startswith(folders)} | {*folders}


def test_tests_share_code_through_support_only():
    for path in sorted(TESTS.rglob("*.py")):
        for name, _ in imports_of(path):
            assert not name.startswith("tests.") or name.startswith("tests.support"), (
                f"{path} imports {name}"
            )


def test_public_names_are_there():
    for name in tritonrnn.__all__:
        assert getattr(tritonrnn, name) is not None
    assert {"RNN", "RNNCell", "backend", "convert", "explain", "export", "functional"} <= set(
        tritonrnn.__all__
    )


WORK = """
    import torch, tritonrnn
    from torch.nn.utils.rnn import pack_sequence
    x = torch.randn(4, 2, 3)
    for input in (x, pack_sequence([x[:, 0], x[:2, 1]])):
        rnn = tritonrnn.convert(torch.nn.RNN(3, 5, 2, bidirectional=True))
        output, h_n = rnn(input)
        h_n.sum().backward()
        assert tritonrnn.explain(rnn, input).backend == "torch"
    tritonrnn.RNNCell(3, 5)(x[0])
"""


@pytest.mark.slow
def test_torch_path_never_imports_triton():
    program = (
        WORK
        + """
    import sys
    loaded = {name.split(".")[0] for name in sys.modules}
    print(*sorted(loaded & {"triton", "perf", "pandas", "onnx", "onnxscript"}))
    with_triton = ("tritonrnn.kernels", "tritonrnn.autotune")
    print(*(name for name in sys.modules if name.startswith(with_triton)))
    """
    )
    assert run_alone(program).split() == []


@pytest.mark.slow
def test_everything_but_triton_works_without_it():
    program = """
    import sys
    sys.modules["triton"] = None
    """
    program += (
        WORK
        + """
    with tritonrnn.backend("triton"):
        try:
            rnn(x)
        except RuntimeError as error:
            print(error)
    """
    )
    assert "triton" in run_alone(program).lower()
