"""Verbs within one process, as a stranger would offer them: writes are memmove, and each control message can be met.

`Loopback.meet` is called with each SEND before it is delivered (who sends, its bytes) and may change it, or break the
connection by raising `Break`.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections import deque

from whimbrel import verbs
from whimbrel.errors import ChannelClosed, ConnectError
from whimbrel.verbs import Access, QpState, WcOpcode, WcStatus, WorkCompletion

_changed = threading.Condition(threading.RLock())
_keys = itertools.count(100)
_listening = {}


class Break(Exception):
    """The connection dies here."""


def _wait(ready, patience, what):
    with _changed:
        while not ready():
            patience.check(what)
            _changed.wait(min(0.05, patience.remaining()))


class Region(verbs.MemoryRegion):
    def __init__(self, domain, address, length, access):
        self.address, self.length, self.access = address, length, access
        self.lkey, self.rkey, self.domain = next(_keys), next(_keys), domain
        domain.regions.append(self)

    def dereg(self):
        with _changed:
            if self in self.domain.regions:
                self.domain.regions.remove(self)

    def holds(self, address, length):
        return self.address <= address and address + length <= self.address + self.length


class Domain(verbs.ProtectionDomain):
    def __init__(self, context):
        self.context, self.regions = context, []

    def reg_mr(self, address, length, access, *, fd=None, fd_offset=0):
        return Region(self, address, length, access)

    def close(self):
        self.regions.clear()

    def by(self, key, address, length, kind):
        for region in self.regions:
            if getattr(region, kind) == key and region.holds(address, length):
                return region
        return None


class Queue(verbs.CompletionQueue):
    def __init__(self):
        self.found, self.closed = deque(), False

    def poll(self, count):
        with _changed:
            if self.closed:
                raise ChannelClosed("the queue was closed")
            return [self.found.popleft() for _ in range(min(count, len(self.found)))]

    def wait(self, patience):
        _wait(lambda: self.found or self.closed, patience, "waiting for completions")
        if self.closed:
            raise ChannelClosed("the queue was closed")

    def close(self):
        with _changed:
            self.closed = True
            _changed.notify_all()

    def put(self, *args):
        self.found.append(WorkCompletion(*args))
        _changed.notify_all()


class Pair(verbs.QueuePair):
    qp_num = 1

    def __init__(self, owner, domain, sends, receives):
        self.owner, self.domain, self.sends, self.receives = owner, domain, sends, receives
        self.posted, self.now, self.peer = deque(), QpState.INIT, None

    @property
    def state(self):
        return self.now

    def post_recv(self, address, length, lkey, wr_id):
        with _changed:
            self._check()
            if self.now is QpState.ERR:
                self.receives.put(wr_id, WcStatus.WR_FLUSH_ERR, WcOpcode.RECV)
                return
            assert self.domain.by(lkey, address, length, "lkey")
            self.posted.append((address, length, wr_id))
            _changed.notify_all()

    def post_send(self, address, length, lkey, wr_id, *, imm_data=None, signalled=True):
        data = ctypes.string_at(address, length)
        try:
            data = Loopback.meet(self.owner, data)
        except Break:
            self.fail()
        with _changed:
            self._check()
            _changed.wait_for(lambda: self.now is not QpState.RTS or self.peer.posted)
            if self.now is not QpState.RTS:
                self.sends.put(wr_id, WcStatus.WR_FLUSH_ERR, WcOpcode.SEND)
                return
            where, _, theirs = self.peer.posted.popleft()
            ctypes.memmove(where, data, len(data))
            self.peer.receives.put(theirs, WcStatus.SUCCESS, WcOpcode.RECV, len(data))
            self.sends.put(wr_id, WcStatus.SUCCESS, WcOpcode.SEND)

    def post_write(self, local, lkeys, remote, rkeys, lengths, wr_id, *, imm_data=None, signalled=True):
        rows = [
            (int(a), int(k), int(r), int(q), int(n))
            for a, k, r, q, n in zip(local, lkeys, remote, rkeys, lengths, strict=True)
        ]
        with _changed:
            self._check()
            status = WcStatus.SUCCESS if self.now is QpState.RTS else WcStatus.WR_FLUSH_ERR
            for a, k, r, q, n in rows:
                if status is WcStatus.SUCCESS and not self.domain.by(k, a, n, "lkey"):
                    status = WcStatus.LOC_PROT_ERR
                theirs = self.peer.domain.by(q, r, n, "rkey")
                if status is WcStatus.SUCCESS and not (theirs and theirs.access & Access.REMOTE_WRITE):
                    status = WcStatus.REM_ACCESS_ERR
            if status is WcStatus.SUCCESS:
                for a, _, r, _, n in rows:
                    ctypes.memmove(r, a, n)
            self.sends.put(wr_id, status, WcOpcode.RDMA_WRITE)
            if status is not WcStatus.SUCCESS:
                self.fail()

    def fail(self):
        with _changed:
            for end in (self, self.peer):
                if end is not None and end.now is not QpState.ERR:
                    end.now = QpState.ERR
                    while end.posted:
                        end.receives.put(end.posted.popleft()[2], WcStatus.WR_FLUSH_ERR, WcOpcode.RECV)
            _changed.notify_all()

    def _check(self):
        if self.owner.closed:
            raise ChannelClosed("the queue pair was closed")

    def close(self):
        self.fail()


class Context(verbs.Context):
    attributes = verbs.DeviceAttributes(
        name="loop",
        max_mr_size=1 << 40,
        max_mr=1 << 16,
        max_qp_wr=1024,
        max_cqe=4096,
        max_msg_size=1 << 20,
        max_write_batch=64,
        max_write_size=4 << 20,
    )

    def __init__(self):
        self.made = []

    def alloc_pd(self):
        self.made.append(Domain(self))
        return self.made[-1]

    def create_comp_channel(self):
        raise NotImplementedError

    def create_cq(self, cqe, channel=None):
        self.made.append(Queue())
        return self.made[-1]


class Id(verbs.ConnectionId):
    def __init__(self, peer, listener=None):
        self.context, self.peer, self.private_data = Context(), peer, b""
        self.listener, self.other, self.pair, self.closed, self.answered = listener, None, None, False, None

    def create_qp(self, pd, send_cq, recv_cq, *, max_send_wr, max_recv_wr):
        self.pair = Pair(self, pd, send_cq, recv_cq)
        return self.pair

    def connect(self, private_data, patience, *, rnr_retry=7):
        far = Id("loop: who connected")
        far.other, self.other, far.private_data = self, far, private_data
        with _changed:
            if self.listener.closed:
                raise ConnectError("nobody listens")
            self.listener.waiting.append(far)
            _changed.notify_all()
        _wait(lambda: self.answered is not None or far.closed or self.closed, patience, "connecting")
        if self.answered is None:
            raise verbs.ConnectRejected("rejected")
        self.private_data = self.answered
        return self.answered

    def accept(self, private_data, patience, *, rnr_retry=7):
        with _changed:
            ours, theirs = self.pair, self.other.pair
            ours.peer, theirs.peer = theirs, ours
            ours.now = theirs.now = QpState.RTS
            self.other.answered = private_data
            _changed.notify_all()

    def reject(self, private_data=b""):
        self.close()

    def get_event(self, patience):
        raise NotImplementedError

    def disconnect(self):
        if self.pair is not None:
            self.pair.fail()

    def close(self):
        self.disconnect()
        with _changed:
            self.closed = True
            for one in self.context.made:
                one.close()
            _changed.notify_all()


class Listener(verbs.CmListener):
    host = "127.0.0.1"

    def __init__(self, port):
        self.port, self.waiting, self.closed = port, deque(), False

    def get_request(self, patience):
        _wait(lambda: self.waiting or self.closed, patience, "waiting for a peer")
        with _changed:
            if self.closed:
                raise ChannelClosed("the listener was closed")
            return self.waiting.popleft()

    def close(self):
        with _changed:
            self.closed = True
            for one in self.waiting:
                one.close()
            _listening.pop(self.port, None)
            _changed.notify_all()


class Loopback(verbs.VerbsProvider):
    ports = itertools.count(1000)

    @staticmethod
    def meet(sender, data):
        """What becomes of a message; tests put their own here."""
        return data

    def listen(self, host, port):
        with _changed:
            port = port or next(self.ports)
            if port in _listening:
                raise ConnectError(f"{port} is in use")
            _listening[port] = Listener(port)
            return _listening[port]

    def resolve(self, host, port, patience):
        with _changed:
            if port not in _listening:
                raise ConnectError(f"nobody listens on {port}")
            return Id(f"loop:{port}", _listening[port])


class Offers:
    """`VerbsOffers` with nothing but the loopback."""

    def provider(self):
        return verbs.VerbsProviderSpec(name="loopback", summary="", create=Loopback, probe=lambda: None)
