"""The harness itself: QEMUs that migrate to each other, and judges that can say no."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from . import guests
from .peer import Qemu, capture, feed
from .qmp import QmpError, spell

PAGE, LOW = guests.PAGE, guests.LOW
Start = Callable[..., Qemu]


def their_pages(qemu: Qemu) -> bytes:
    return qemu.memory(LOW, guests.high(qemu.mib) - LOW)


@pytest.mark.parametrize("machine", ["pc", "q35"])
def test_a_guest_goes_on_at_the_destination(qemu: Start, machine: str) -> None:
    source = qemu(16, machine=machine, guest=guests.sweep(16))
    destination = qemu(16, machine=machine, guest=guests.sweep(16), incoming="defer")
    # Slow enough for a second pass over what the guest has written since the first, fast enough for an end.
    source.execute("migrate-set-parameters", max_bandwidth=32 << 20, downtime_limit=2000)
    source.wait_started()
    destination.execute("migrate-incoming", uri=destination.uri("stream"))
    source.migrate(destination.uri("stream"))
    assert source.wait_status("completed", "failed") == "completed"
    assert destination.wait_status("completed", "failed") == "completed"
    source.wait_run_state("postmigrate")
    assert destination.run_state() == "running"
    destination.serial.wait_more()
    assert b"A" not in destination.serial.heard, "it began anew"
    destination.execute("stop")
    guests.check_sweep(their_pages(source))
    guests.check_sweep(their_pages(destination))
    events = spell(source.qmp.events)
    assert events[:3] == ["setup", "PASS 1", "active"]
    assert "PASS 2" in events[: events.index("STOP")], "the guest was not moved while it ran"


def test_all_that_mix_does_arrives(qemu: Start) -> None:
    source = qemu(4, guest=guests.mix(4))
    destination = qemu(4, guest=guests.mix(4), incoming="defer", stopped=True)
    for each in (source, destination):
        each.switch_on("xbzrle")
    source.execute("migrate-set-parameters", max_bandwidth=8 << 20, downtime_limit=50)
    source.serial.wait(b"AB")
    feed(destination, capture(source))
    assert destination.wait_status("completed", "failed") == "completed"
    assert their_pages(source) == their_pages(destination)
    info = source.execute("query-migrate")
    assert info["ram"]["dirty-sync-count"] > 2
    assert info["xbzrle-cache"]["pages"] > 0
    assert info["xbzrle-cache"]["overflow"] > 0


def test_the_tiny_stream_is_a_whole_machine(qemu: Start, tiny_machine: dict[str, Any], tiny_stream: bytes) -> None:
    assert tiny_stream.startswith(b"QEVM")
    assert len(tiny_stream) < 64 << 10
    destination = qemu(**tiny_machine, incoming="defer")
    feed(destination, tiny_stream)
    assert destination.wait_status("completed", "failed") == "completed"
    destination.serial.wait_more()
    assert b"A" not in destination.serial.heard
    assert spell(destination.qmp.events) == ["setup", "active", "RESUME", "completed"]


def test_a_destination_that_refuses_says_why_and_exits(
    qemu: Start, tiny_machine: dict[str, Any], tiny_stream: bytes
) -> None:
    destination = qemu(**tiny_machine, incoming="defer")
    feed(destination, b"QEVX" + tiny_stream[4:])
    assert destination.wait_exit() == 1
    assert "Not a migration stream" in destination.log()
    assert "exit status 1" in destination.report()


def test_a_command_line_that_cannot_be_is_told_with_the_reason(qemu: Start) -> None:
    with pytest.raises(EOFError) as caught:
        qemu(16, machine="none-of-these")
    assert "unsupported machine type" in "".join(caught.value.__notes__)


NEEDS_ONE = "test_a_refusal_has_its_class_and_text"


def test_a_refusal_has_its_class_and_text(qemu: Start) -> None:
    with pytest.raises(QmpError, match="CommandNotFound: The command nothing has not been found"):
        qemu(16, machine="none").execute("nothing")


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_nothing_is_left_of_what_was_closed(real_qemu: None) -> None:
    before = descriptors()
    with Qemu(16, machine="none") as one:
        assert Path(f"/proc/{one.process.pid}").exists()
        assert one.dir.is_dir()
    assert not Path(f"/proc/{one.process.pid}").exists()
    assert not one.dir.exists()
    assert descriptors() == before
    assert "exit status -9" in one.report()


@pytest.mark.parametrize(("ci", "outcome"), [("", "skipped"), ("true", "failed")])
def test_where_no_qemu_is_tests_are_skipped_but_not_in_ci(ci: str, outcome: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{__file__}::{NEEDS_ONE}"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PATH": str(tmp_path), "CI": ci},
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"1 {outcome}" in done.stdout.replace("1 error", "1 failed")
    assert "there is no qemu-system-x86_64; as root on Debian, tools/make-qemu installs it" in done.stdout


def test_what_installs_a_qemu_never_fails_and_says_in_a_line_why_it_did_not(tmp_path: Path) -> None:
    bash = shutil.which("bash")
    assert bash
    (tmp_path / "bash").symlink_to(bash)
    tool = Path(__file__).parents[2] / "tools" / "make-qemu"
    done = subprocess.run([bash, tool], env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.startswith("no QEMU: there is no apt-get")
    assert done.stderr.count("\n") == 1


# --------------------------------------------------------------------------------------------------------- the guests


@pytest.mark.parametrize(("name", "origin"), [("sweep", "0x7c00"), ("mix", "0x7c00"), ("tiny", "0")])
def test_the_bytes_of_a_guest_are_those_of_its_source(name: str, origin: str) -> None:
    if platform.machine() != "x86_64" or not (shutil.which("as") and shutil.which("ld")):
        pytest.skip("there is no assembler for x86 here (binutils)")
    told = subprocess.run([guests.FOLDER / "assemble", name, origin], capture_output=True, text=True, check=True)
    assert told.stdout == (guests.FOLDER / f"{name}.hex").read_text()


def swept(turns: int, mib: int = 3) -> bytearray:
    """The memory of a sweep that has touched `turns` pages."""
    memory = bytearray(guests.high(mib) - LOW)
    pages = len(memory) // PAGE
    for page in range(pages):
        memory[page * PAGE] = (turns // pages + (page < turns % pages)) % 256
    return memory


@pytest.mark.parametrize("turns", [0, 1, 255, 256, 257, 255 * 256, 255 * 256 + 7, 256 * 256])
def test_a_sweep_that_was_stopped_anywhere_is_right(turns: int) -> None:
    guests.check_sweep(bytes(swept(turns)))


@pytest.mark.parametrize(("where", "what"), [(0, 1), (100, 1), (100, -1), (150, -1), (200, 1), (255, 2)], ids=str)
def test_a_page_of_another_time_is_seen(where: int, what: int) -> None:
    memory = swept(256 * 5 + 150)
    memory[where * PAGE] += what
    with pytest.raises(AssertionError, match="where one, downwards by 1, may be"):
        guests.check_sweep(bytes(memory))


@pytest.mark.parametrize("at", [1, 2047, 4095])
def test_a_byte_that_no_guest_wrote_is_seen(at: int) -> None:
    memory = swept(700)
    memory[77 * PAGE + at] = 1
    with pytest.raises(AssertionError, match="1 pages have bytes that no guest wrote, the first at 0x14d000"):
        guests.check_sweep(bytes(memory))
