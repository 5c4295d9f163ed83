"""What tests of compiled kernels share."""

from collections.abc import Iterator

import pytest

from tests.support.ptxsim.client import Emulator


@pytest.fixture(scope="session")
def emulator() -> Iterator[Emulator]:
    emulator = Emulator()
    yield emulator
    emulator.close()
