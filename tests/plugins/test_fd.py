"""fd: the conformance suite."""
import os, socket
from whimbrel.testing.transports import TransportConformance
from whimbrel_transports.fd import FdTransport

def passed(*numbers):
    for n in numbers: os.set_inheritable(n, True)
    return tuple(str(n) for n in numbers)

class TestFdSockets(TransportConformance):
    nobody = "1000000"
    bad_addresses = ("", "x", "-1", "2", "0x10", "1e3", "3 ", "99999999999")

    def make(self):
        return FdTransport()

    def ends(self, tmp_path):
        return passed(*(one.detach() for one in socket.socketpair()))

class TestFdPipes(TransportConformance):
    duplex = False
    nobody = "1000000"

    def make(self):
        return FdTransport()

    def ends(self, tmp_path):
        return passed(*os.pipe()[::-1])
