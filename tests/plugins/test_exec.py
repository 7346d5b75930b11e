"""exec: the conformance suite."""
import os
from whimbrel.testing.transports import TransportConformance
from whimbrel_transports.exec import ExecTransport

class TestExec(TransportConformance):
    duplex = False
    close_abandons = True
    nobody = "/nonexistent/program"
    bad_addresses = ("", " ", "cat | cat", "cat > file", "'open", "\0")

    def make(self):
        return ExecTransport()

    def ends(self, tmp_path):
        fifo = tmp_path / str(len(list(tmp_path.iterdir())))
        os.mkfifo(fifo)
        return f"sh -c 'cat > {fifo}'", f"cat {fifo}"
