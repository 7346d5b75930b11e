"""One way to run every parser, in every way that its bytes can come."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st

from whimbrel.abc import Peek
from whimbrel.errors import ProtocolError

settings.register_profile("steady", derandomize=True, deadline=None)
settings.load_profile("steady")

POISON = 0xAA


class Feeder:
    """Feeds a parser as bytes come in. `taken` is what it consumed, `missing` what its request still lacks.

    A view is overwritten as soon as the parser asks again, so one that keeps a view is found out.
    """

    def __init__(self, parser):
        self.data = bytearray()
        self.taken = 0
        self.done = False
        self.value = None
        self._parser = parser
        self._request = None
        self._given = bytearray()
        self._step(None)

    @property
    def missing(self):
        size = self._request.size if isinstance(self._request, Peek) else self._request
        return max(0, self.taken + size - len(self.data))

    def feed(self, data):
        self.data += data
        while not self.done and not self.missing:
            size = self._request.size if isinstance(self._request, Peek) else self._request
            fresh = bytearray(self.data[self.taken : self.taken + size])
            if not isinstance(self._request, Peek):
                self.taken += size
            self._step(fresh)
        return self

    def _step(self, given):
        try:
            self._request = next(self._parser) if given is None else self._parser.send(memoryview(given))
        except StopIteration as end:
            self.done, self.value = True, end.value
        finally:
            self._given[:] = bytes([POISON]) * len(self._given)
            self._given = given if given is not None else self._given
        if self.done:
            self._given[:] = bytes([POISON]) * len(self._given)


def run_three_ways(make, data, value, *, peeked=b""):
    """Parse `data` whole, byte by byte, and with more behind it; all must give `value` and take exactly `data`.

    `peeked` is what must follow for the parser to know its end; it is looked at, never taken. On the way each
    truncation asks for more, and for no more than there is.
    """
    whole = Feeder(make()).feed(data + peeked)
    assert (whole.done, whole.value, whole.taken) == (True, value, len(data))

    crumbs = Feeder(make())
    for number, byte in enumerate(data + peeked):
        assert not crumbs.done, f"it did not wait for byte {number}"
        assert 1 <= crumbs.missing <= len(data + peeked) - number, (
            f"after {number} bytes it wants {crumbs.missing} more"
        )
        crumbs.feed(bytes([byte]))
    assert (crumbs.done, crumbs.value, crumbs.taken) == (True, value, len(data))

    for trailing in (b"\0" * 32, b"\xff" * 32, b"\x7e\x05\x01\x08" * 8, b"x"):
        more = Feeder(make()).feed(data + peeked + trailing)
        assert (more.done, more.value, more.taken) == (True, value, len(data))


def outcome_of(make, data):
    """What becomes of any bytes: ("value", it), ("more", how many) or ("refused", the error). Nothing else may be."""
    try:
        feeder = Feeder(make()).feed(data)
    except ProtocolError as exc:
        return "refused", exc
    return ("value", feeder.value) if feeder.done else ("more", feeder.missing)


@st.composite
def mutations(draw, data):
    """`data` with some bytes changed, taken out, put in, or doubled."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(("change", "bit", "insert", "remove", "double"))):
            case "change" if at < len(data):
                data[at] = draw(st.sampled_from((0, 1, 5, 0x7E, 0x7F, 0x80, 0xFF)) | st.integers(0, 255))
            case "bit" if at < len(data):
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=8))
            case "remove":
                del data[at : at + draw(st.integers(1, 8))]
            case "double":
                data[at:at] = data[at : at + draw(st.integers(1, 8))]
    return bytes(data)


@pytest.fixture(scope="session")
def three_ways():
    return run_three_ways


@pytest.fixture(scope="session")
def outcome():
    return outcome_of


@pytest.fixture(scope="session")
def feeder():
    return Feeder


@pytest.fixture(scope="session")
def mutated():
    """A strategy of damaged copies of some bytes."""
    return mutations


@pytest.fixture
def refused(outcome):
    """Asserts that bytes are refused, and returns the message."""

    def refused(make, data):
        kind, error = outcome(make, data)
        assert kind == "refused", f"{data[:64].hex(' ')} gave {kind} {error}"
        return str(error)

    return refused
