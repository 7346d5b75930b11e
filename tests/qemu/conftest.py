"""QEMUs for the tests, their streams, and what went wrong in them.

A test that asks for any of these is skipped where there is no QEMU; where `CI` is true in the environment it fails.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from . import guests
from .ours import Ours
from .peer import Qemu, capture, missing

_STARTED = pytest.StashKey[list[Qemu]]()


@pytest.fixture(scope="session")
def real_qemu() -> None:
    """There is a QEMU here, or nothing of this is tested."""
    if reason := missing():
        if os.environ.get("CI") == "true":
            pytest.fail(f"{reason}. CI=true, so the tests that need a QEMU must not be skipped", pytrace=False)
        pytest.skip(reason)


@pytest.fixture
def qemu(real_qemu: None, request: pytest.FixtureRequest) -> Iterator[Callable[..., Qemu]]:
    """`qemu(mib, …)`: a QEMU of this test's, as `peer.Qemu` takes it, which is closed behind it."""
    started = request.node.stash.setdefault(_STARTED, [])

    def start(mib: int = 32, **options: Any) -> Qemu:
        fresh = Qemu(mib, **options)
        started.append(fresh)
        return fresh

    yield start
    for each in started:
        each.close()


@pytest.fixture
def ours() -> Iterator[Callable[..., Ours]]:
    """`ours(…)`: a machine of whimbrel's with a monitor, as `ours.Ours` takes it, which is closed behind the test."""
    with ExitStack() as started:
        yield lambda **options: started.enter_context(Ours(**options))


@pytest.fixture(scope="session")
def tiny_machine(real_qemu: None) -> dict[str, Any]:
    """What a QEMU must be started with to take `tiny_stream`."""
    return {"mib": 1, "machine": "isapc", "firmware": guests.tiny()}


@pytest.fixture(scope="session")
def tiny_stream(tiny_machine: dict[str, Any]) -> bytes:
    """A whole stream of a machine so small that all its prefixes can be tried: under 64 KiB, with everything in it."""
    with Qemu(**tiny_machine) as source:
        source.serial.wait(b"AB")
        return capture(source)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the QEMUs of a test that failed."""
    report = yield
    if report.failed:
        report.sections += [(f"QEMU {each.process.pid}", each.report()) for each in item.stash.get(_STARTED, [])]
    return report
