"""Large writes that go on beside whoever posts them: their order, what they read, and how they end."""

from __future__ import annotations

import threading
from contextlib import ExitStack

import numpy as np
import pytest

from whimbrel.testing._bench import nothing_left
from whimbrel.testing.verbs import VerbsBench
from whimbrel.verbs import Access, WcOpcode, WcStatus
from whimbrel_transports._verbs_copying import Copying
from whimbrel_transports._verbs_rendezvous import Emulation, Ways
from whimbrel_transports._verbs_shared import SharedMemory

LONG = 30.0
SIZE = 1 << 20


def test_jobs_are_done_in_their_order_and_waited_for():
    with nothing_left(5):
        copying, done, go_on = Copying(), [], threading.Event()
        copying.wait()  # there are none
        copying.add(lambda: go_on.wait(LONG))
        for number in range(100):
            copying.add(lambda number=number: done.append(number))
        assert not done
        go_on.set()
        copying.wait()
        assert done == list(range(100))
        copying.add(lambda: done.append("last"))
        copying.close()
        copying.close()
        assert done[-1] == "last"


class Large:
    """Two ends over shared memory, with a MiB at each beside what is theirs; `hold` keeps copies from beginning."""

    def __init__(self, stack, monkeypatch):
        self.bench = VerbsBench(Emulation(Ways.SHARED), "memfd", LONG, stack)
        self.near, self.far = self.bench.pair()
        self.ours, self.theirs = np.full(SIZE, 7, np.uint8), np.zeros(SIZE, np.uint8)
        self.lkey = self.register(self.near, self.ours, Access.LOCAL_WRITE)
        self.fd = None
        self.reached, self.go_on = threading.Event(), threading.Event()
        write = SharedMemory.write

        def held(shared, *args):
            self.reached.set()
            assert self.go_on.wait(LONG)
            return write(shared, *args)

        monkeypatch.setattr(SharedMemory, "write", held)
        self.region = self.register(self.far, self.theirs, Access.LOCAL_WRITE | Access.REMOTE_WRITE)
        self.bench.settle(self.near, self.far)

    @staticmethod
    def register(end, memory, access):
        return end.pair.pd.reg_mr(memory.ctypes.data, memory.size, access)

    def post(self, wr_id, rkey=None):
        one = [np.array([value], np.uint64) for value in (self.ours.ctypes.data, self.theirs.ctypes.data, SIZE)]
        rkey = self.region.rkey if rkey is None else rkey
        self.near.pair.post_write(one[0], self.lkey.lkey, one[1], rkey, one[2], wr_id)
        for each in one:
            each[:] = 0  # the arrays may be changed on return


@pytest.fixture
def large(monkeypatch):
    with nothing_left(5), ExitStack() as stack:
        yield Large(stack, monkeypatch)


def test_it_is_posted_before_it_is_written_and_a_message_comes_behind_it(large):
    large.post(1)
    assert large.reached.wait(LONG)
    assert not large.theirs.any()
    large.far.receive(9)
    sending = threading.Thread(target=large.near.send, args=(2,))
    sending.start()
    large.go_on.set()
    completion = large.far.next()
    assert (completion.wr_id, completion.status) == (9, WcStatus.SUCCESS)
    assert (large.theirs == 7).all()
    sending.join(LONG)
    found = [large.near.next() for _ in range(2)]
    assert [(each.wr_id, each.status) for each in found] == [(1, WcStatus.SUCCESS), (2, WcStatus.SUCCESS)]
    assert found[0].opcode is WcOpcode.RDMA_WRITE
    assert found[0].byte_len == SIZE


def test_its_memory_stays_registered_until_it_is_over(large):
    large.post(1)
    assert large.reached.wait(LONG)
    ending = threading.Thread(target=large.lkey.dereg)
    ending.start()
    ending.join(0.05)
    assert ending.is_alive()
    large.go_on.set()
    ending.join(LONG)
    assert not ending.is_alive()
    assert large.near.next().status is WcStatus.SUCCESS
    assert (large.theirs == 7).all()


def test_one_that_is_refused_takes_those_behind_it_along(large):
    """The responder judges it, after those before it were written."""
    large.go_on.set()
    large.post(1)
    assert large.near.next().status is WcStatus.SUCCESS
    large.theirs[:] = 0
    large.post(2, rkey=large.region.rkey ^ 0x5A5A)
    assert large.near.next().status is WcStatus.REM_ACCESS_ERR
    large.post(3)
    assert large.near.next().status is WcStatus.WR_FLUSH_ERR
    assert not large.theirs.any()


def test_what_waits_when_the_connection_ends_is_not_written(large):
    large.post(1)
    assert large.reached.wait(LONG)
    large.post(2)
    large.near.id.disconnect()
    assert [large.near.next().status for _ in range(2)] == [WcStatus.WR_FLUSH_ERR] * 2
    large.go_on.set()
    large.near.id.close()  # and waits for the copying to end
    assert not any(thread.name == "whimbrel-verbs-copying" for thread in threading.enumerate())
