"""perf is imported with less than the extra ``perf``."""

import pytest

from tests.support.processes import run_alone


@pytest.mark.slow
def test_perf_imports_without_what_the_tests_need_and_what_few_commands_do():
    loaded = run_alone(
        """
        import importlib, pkgutil, sys
        tests_need = ("expecttest", "hypothesis", "onnx", "onnxruntime", "pytest", "tests")
        for name in (*tests_need, "flashrnn", "wordfreq"):
            sys.modules[name] = None
        import perf
        names = [one.name for one in pkgutil.walk_packages(perf.__path__, "perf.")]
        for name in names:
            importlib.import_module(name)
        # Imported by a probe when it runs.
        import torch._dynamo.testing
        print(len(names))
        """
    )
    assert int(loaded) > 30
