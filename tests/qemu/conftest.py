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
from .beside import Beside, Two
from .ours import Ours
from .peer import Qemu, capture, missing, version

_STARTED = pytest.StashKey[list[Qemu]]()


@pytest.fixture(scope="session")
def real_qemu() -> None:
    """There is a QEMU here, or nothing of this is tested."""
    if reason := missing():
        if os.environ.get("CI") == "true":
            pytest.fail(f"{reason}. CI=true, so the tests that need a QEMU must not be skipped", pytrace=False)
        pytest.skip(reason)


@pytest.fixture(scope="session")
def qemu_7_2(real_qemu: None) -> None:
    """The QEMU here is a 7.2, whose monitor ours is like."""
    if " 7.2." not in version():
        pytest.skip(f"our monitor is compared with that of QEMU 7.2; this is {version()}")


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


@pytest.fixture
def make_qemu(qemu_7_2: None, qemu: Callable[..., Qemu], tiny_machine: dict[str, Any]) -> Callable[..., Qemu]:
    return lambda **options: qemu(**tiny_machine, **options)


@pytest.fixture
def beside(make_qemu: Callable[..., Qemu], ours: Callable[..., Ours]) -> Beside:
    """Sources whose guests run, and fresh destinations; the events of the start are behind us."""
    made = Beside(Two(make_qemu(), make_qemu(incoming="defer")), Two(ours(), ours()))
    assert isinstance(made.theirs.source, Qemu)
    made.theirs.source.wait_started()
    made.ours.source.execute("cont")
    made.ours.source.qmp.wait("RESUME")
    made.ours.source.qmp.forget()
    return made


@pytest.fixture(scope="module")
def idle(qemu_7_2: None) -> Iterator[tuple[Qemu, Ours]]:
    """A QEMU and a machine of ours that were never started."""
    with (
        Qemu(1, machine="none", stopped=True, events=False, extra=["-name", "heat"]) as theirs,
        Ours(events=False) as ours,
    ):
        yield theirs, ours


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the QEMUs of a test that failed."""
    report = yield
    if report.failed:
        report.sections += [(f"QEMU {each.process.pid}", each.report()) for each in item.stash.get(_STARTED, [])]
    return report
