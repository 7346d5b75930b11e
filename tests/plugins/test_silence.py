"""A host that has died says nothing: TCP's own clocks notice, in a real network whose link goes down."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HOST = Path(__file__).with_name("silent_host.py")
LONG = 120


def ip(side, *arguments):
    subprocess.run(["nsenter", f"--net=/proc/{side.pid}/ns/net", "ip", *arguments], check=True, timeout=LONG)


@pytest.fixture
def side():
    """Starts a side in a network of its own; kills it in the end, and the network goes with it."""
    if os.geteuid() or subprocess.run(["unshare", "--net", "ip", "link"], capture_output=True, check=False).returncode:
        pytest.skip("only root can make networks, with iproute2 and util-linux")
    started = []

    def start():
        # Its network is there as soon as it answers.
        held = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", "echo; exec cat"], stdout=subprocess.PIPE, stdin=subprocess.PIPE
        )
        started.append(held)
        held.stdout.readline()
        return held

    yield start
    for each in started:
        each.kill()
        each.wait()
        each.stdin.close()
        each.stdout.close()


def played(side, role):
    return subprocess.Popen(
        ["nsenter", f"--net=/proc/{side.pid}/ns/net", sys.executable, str(HOST), role],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_both_ends_of_a_link_that_is_down_end(side):
    """One that waits is told by keepalive, one that sends by the user time-out; neither is told by a peer."""
    here, there = side(), side()
    ip(here, "link", "add", "wire0", "type", "veth", "peer", "name", "wire1", "netns", str(there.pid))
    for each, name, address in ((here, "wire0", "10.83.0.1/24"), (there, "wire1", "10.83.0.2/24")):
        ip(each, "address", "add", address, "dev", name)
        ip(each, "link", "set", name, "up")
    with played(here, "listen") as waits:
        assert waits.stdout.readline() == "listens\n"
        with played(there, "send") as sends:
            assert sends.stdout.readline() == waits.stdout.readline() == "connected\n"
            # At the other end there is no carrier then: what is sent goes nowhere, and nobody says so.
            ip(there, "link", "set", "wire1", "down")
            ended = [each.communicate("\n", timeout=LONG)[0] for each in (sends, waits)]
    for said in ended:
        assert "timed out" in said.lower(), ended
