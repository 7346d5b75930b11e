"""file: the conformance suite."""
from whimbrel.testing.stored import StoredTransportConformance
from whimbrel_transports.file import FileTransport

class TestFile(StoredTransportConformance):
    bad_addresses = ("", "/", ".", "..", "folder/", "\0", ",offset=1", "a,offset=", "a,offset=-1", "a,offset=1x")

    def make(self):
        return FileTransport()

    def address(self, tmp_path):
        return f"{tmp_path}/machine"
