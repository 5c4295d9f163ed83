"""What tests of compiled kernels share."""

from collections.abc import Iterator

import pytest

from tests.support.ptxsim.client import Emulator


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests whose kernels are compiled at once, so that one process has them all.

    Of the tests that it has not begun yet, another one of pytest-xdist may take the last over.
    """
    items.sort(key=lambda item: item.path.stem != "test_static")


@pytest.fixture(scope="session")
def emulator() -> Iterator[Emulator]:
    emulator = Emulator()
    yield emulator
    emulator.close()
