"""Signals as events."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys

import pytest

from whimbrel.cli._signals import Signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_is_handed_on(number):
    before = signal.getsignal(number)
    heard = queue.SimpleQueue()
    with Signals(heard.put):
        os.kill(os.getpid(), number)
        assert heard.get(timeout=10) is number
    assert signal.getsignal(number) is before
    assert signal.set_wakeup_fd(-1) == -1


def test_what_was_started_to_outlive_its_terminal_does():
    """As with nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    heard = queue.SimpleQueue()
    try:
        with Signals(heard.put):
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
            assert heard.get(timeout=10) is signal.SIGTERM
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_terminal_that_goes_is_no_impatience():
    heard = queue.SimpleQueue()
    with Signals(heard.put):
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGHUP)
        assert heard.get(timeout=10) is signal.SIGHUP
    assert heard.empty()


PROGRAM = """
import os, signal, threading
from whimbrel.cli._signals import Signals
with Signals(lambda number: os.kill(os.getpid(), signal.SIGINT)):
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait()
"""


def test_the_second_ends_the_process_at_once():
    assert subprocess.run([sys.executable, "-c", PROGRAM], timeout=60).returncode == 130
