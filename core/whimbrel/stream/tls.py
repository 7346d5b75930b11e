"""TLS round any channel: mutual, 1.3 or 1.2, with an end that can be told from a cut.

The rules it lives by:

* **One thread is inside of OpenSSL at a time.** Its objects are no more thread-safe than any struct, and Python guards
  them only from 3.13 on; a channel has a reader and a writer at once. So the cipher works on memory, under a lock of
  its own, and what goes over the channel inside goes outside of that lock: a writer that is blocked keeps no reader
  out.
* **Records leave in the order in which they were made**: whoever takes them out of the cipher sends them before the
  next one does. A reader never sends: what the cipher wants to answer goes along with the next bytes that are sent.
* **The end is said** (close_notify). A channel inside that ends without it was cut, by an accident or by somebody, and
  that is ChannelLost: nothing may be concluded from bytes that are missing.
* **Nobody is known before the handshake**, which the first use of a channel makes, on the thread of that use, within a
  time: an `accept` waits for nobody's handshake. A source that connects makes it at once (`shake_hands`).
"""

from __future__ import annotations

import ssl
import threading
from contextlib import contextmanager, suppress
from hashlib import sha256
from typing import TYPE_CHECKING, Final, cast

from whimbrel.abc import Channel
from whimbrel.errors import ChannelClosed, ChannelError, ChannelLost, MigrationCancelled
from whimbrel.stream.forwarding import ForwardingChannel

if TYPE_CHECKING:
    from collections.abc import Iterator

    from typing_extensions import Buffer

    from whimbrel.abc import Patience
    from whimbrel.stream.tls_credentials import Credentials

__all__ = ["TlsChannel"]

CHUNK: Final = 256 << 10  # bytes that go through the cipher at once, either way: they stay in the processor's cache
LOOK: Final = 0.05  # seconds between two looks at whether a handshake is still wanted
FAREWELL: Final = 0.2  # seconds in which a close may still say that it is one


class TlsChannel(ForwardingChannel):
    """The channel `inner`, encrypted, which it takes over; both ends have shown a certificate of one authority.

    At the connecting end `hostname` is the name that the other's certificate must bear; the accepting end has none, and
    asks `credentials` whether the other is allowed. The handshake may take `seconds`. Whatever fails in it, and an end
    without a goodbye, is ChannelLost; with `cut_ends` such an end is one.
    """

    def __init__(self, inner: Channel, credentials: Credentials, *, hostname: str | None, seconds: float,
                 cut_ends: bool = False) -> None:  # fmt: skip
        super().__init__(inner)
        self._cut_ends = cut_ends
        self._credentials, self._seconds = credentials, seconds
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        context = credentials.context
        self._tls = context.wrap_bio(
            self._incoming, self._outgoing, server_side=hostname is None, server_hostname=hostname
        )
        self._cipher = threading.Lock()  # nobody else is inside of OpenSSL
        self._sending = threading.Lock()  # held from taking records out until they are sent
        self._shaking = threading.Lock()
        self._known = False  # the handshake is behind us
        self._refused: ChannelError | None = None  # or has failed
        self._came = memoryview(bytearray(CHUNK))
        self._ahead = memoryview(b"")  # decrypted, and not asked for yet
        self._ended = False  # the peer has said so
        self._lost = self._hint = ""  # why nothing more can be received
        self._said_end = False
        self._closed = False

    @property
    def identity(self) -> bytes:
        """The SHA-256 of the certificate that the peer has shown; empty before the handshake."""
        certificate = self._tls.getpeercert(binary_form=True) if self._known else None
        return sha256(certificate).digest() if certificate else b""

    @property
    def protocol(self) -> str:
        """What was agreed on, such as `TLSv1.3`; empty before the handshake."""
        return (self._tls.version() or "") if self._known else ""

    def shake_hands(self) -> None:
        """Make the handshake, unless it was made. Any thread. Raises ChannelError, and the same error ever after."""
        if self._known:
            return
        with self._shaking:
            self._refuse_closed()
            if self._refused is not None:
                raise self._refused
            if self._known:
                return
            try:
                self._shake_in_time()
            except ChannelError as exc:
                self._refused = exc
                self.inner.close()
                raise
            self._known = True

    @contextmanager
    def given_up_with(self, patience: Patience) -> Iterator[None]:
        """Close it as soon as `patience` is cancelled, while the body runs. Raises MigrationCancelled then."""
        done = threading.Event()

        def look() -> None:
            while not done.wait(LOOK):
                if patience.cancelled.is_set():
                    self.close()
                    return

        thread = threading.Thread(target=look, name="whimbrel-handshake-cancel", daemon=True)
        thread.start()
        try:
            yield
        except ChannelError:
            if patience.cancelled.is_set():
                raise MigrationCancelled(f"cancelled in the TLS handshake with {self.peer}") from None
            raise
        finally:
            done.set()
            thread.join()

    def recv_into(self, buffer: Buffer) -> int:
        """Wait for at least one byte of the peer's, as `Channel.recv_into` says."""
        self.shake_hands()
        view = memoryview(buffer).cast("B")
        if not len(view):
            raise ValueError("a buffer to receive into must not be empty")
        while True:
            self._refuse_closed()
            if count := self._decrypt(view):
                return count
            if self._ended:
                return 0
            self._receive()

    def send(self, data: Buffer) -> None:
        """Send all of `data`, as `Channel.send` says."""
        self.shake_hands()
        view = memoryview(data)
        if not view.nbytes:
            self._refuse_closed()
            return
        view = view.cast("B")
        with self._sending:
            for start in range(0, len(view), CHUNK):
                self._refuse_closed()
                if self._said_end:
                    raise ChannelClosed(f"writing to {self.peer} was ended")
                with self._cipher, self._broken("sending to"):
                    self._tls.write(view[start : start + CHUNK])
                self._send_records()

    def end_writing(self) -> None:
        """Say that no more bytes come, as `Channel.end_writing` says; the channel inside is told too."""
        self.shake_hands()
        with self._sending:
            self._refuse_closed()
            if self._said_end:
                return
            self._say_end()
        self.inner.end_writing()

    def close(self) -> None:
        """Say goodbye, if that takes no time, and close the channel inside. Any thread; twice is fine."""
        if not self._closed:
            self._closed = True
            if self._known and not self._said_end and self._sending.acquire(blocking=False):
                try:
                    self._say_goodbye()
                finally:
                    self._sending.release()
        self.inner.close()

    # ------------------------------------------------------------------------------------------------- the handshake

    def _shake_in_time(self) -> None:
        late = threading.Event()

        def hang_up() -> None:
            late.set()
            with suppress(Exception):
                self.inner.close()

        timer = threading.Timer(self._seconds, hang_up)
        timer.name, timer.daemon = "whimbrel-handshake", True
        timer.start()
        try:
            self._shake()
        except ChannelError as exc:
            if late.is_set() and not self._closed:
                raise ChannelLost(
                    f"{self.peer} has not ended the TLS handshake within {self._seconds:g} s",
                    hint="[limits] handshake-timeout says how long to wait; both ends need tls-creds",
                ) from exc
            raise
        finally:
            timer.cancel()

    def _shake(self) -> None:
        while True:
            try:
                with self._cipher:
                    self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                self._send_records()
                if not self._fill():
                    raise ChannelLost(
                        f"{self.peer} hung up in the TLS handshake",
                        hint="its own log says why; both ends need tls-creds",
                    ) from None
            except ssl.SSLError as exc:
                with suppress(ChannelError):
                    self._send_records()  # the peer is told what was wrong
                raise ChannelLost(f"the TLS handshake with {self.peer} failed: {_said(exc)}", hint=_hint(exc)) from exc
        self._send_records()
        self._credentials.authorise(self._tls, self.peer)

    # ------------------------------------------------------------------------------------------------------ the bytes

    def _decrypt(self, view: memoryview) -> int:
        """What can be had of the records that have come; 0 if there is none, and it may be the end."""
        with self._cipher:
            if not len(self._ahead):
                return self._decrypted(view)
            count = min(len(view), len(self._ahead))
            view[:count], self._ahead = self._ahead[:count], self._ahead[count:]
            return count

    def _decrypted(self, view: memoryview) -> int:
        """The same, past what is ahead. The caller holds `_cipher`."""
        count = 0
        try:
            while count < len(view) and not self._ended and not self._lost:
                came = cast("int", self._tls.read(len(view) - count, view[count:]))
                self._ended = not came
                count += came
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            self._ended = True
        except ssl.SSLError as exc:  # is told behind what came before it
            self._lost, self._hint = f"the TLS connection to {self.peer} broke: {_said(exc)}", _hint(exc)
        return count

    def _receive(self) -> None:
        """Get more records. Raises ChannelLost if none come."""
        if self._lost:
            raise ChannelLost(self._lost, hint=self._hint)
        if not self._fill():
            self._ended = self._cut_ends
            if self._ended:
                return
            self._lost = f"the connection to {self.peer} ended without the goodbye of TLS: it was cut, or the peer died"
            raise ChannelLost(self._lost)

    def _fill(self) -> bool:
        count = self.inner.recv_into(self._came)
        if count:
            with self._cipher:
                self._incoming.write(self._came[:count])
        return count > 0

    def _send_records(self) -> None:
        """Send what the cipher has made. The caller holds `_sending`, or makes the handshake."""
        with self._cipher:
            records = self._outgoing.read()
        if records:
            self.inner.send(records)

    def _say_end(self) -> None:
        """Send close_notify. The caller holds `_sending`."""
        self._said_end = True
        with self._cipher:
            # OpenSSL looks for the peer's goodbye at once, and takes bytes that came before that for a mistake.
            self._ahead = memoryview(bytes(self._ahead) + self._all_decrypted())
            with suppress(ssl.SSLError):
                self._tls.unwrap()
        self._send_records()

    def _all_decrypted(self) -> bytes:
        """What the records that have come hold, which is no more than one `_fill` brings."""
        pieces = []
        piece = memoryview(bytearray(CHUNK))
        while count := self._decrypted(piece):
            pieces.append(bytes(piece[:count]))
        return b"".join(pieces)

    def _say_goodbye(self) -> None:
        """Send close_notify to a peer that may take nothing any more."""
        timer = threading.Timer(FAREWELL, self.inner.close)
        timer.name, timer.daemon = "whimbrel-farewell", True
        timer.start()
        try:
            with suppress(ChannelError):
                self._say_end()
        finally:
            timer.cancel()

    @contextmanager
    def _broken(self, doing: str) -> Iterator[None]:
        try:
            yield
        except ssl.SSLError as exc:
            raise ChannelLost(f"{doing} {self.peer} failed: {_said(exc)}", hint=_hint(exc)) from exc

    def _refuse_closed(self) -> None:
        if self._closed:
            raise ChannelClosed(f"the connection to {self.peer} was closed on this side")


_HINTS: Final = {
    "CERTIFICATE_VERIFY_FAILED": "both certificates must be of the authority in the other's ca-cert.pem, and the "
    "server's must bear the name that is connected to, or tls-hostname",
    "CERTIFICATE_REQUIRED": "the peer wants a certificate",
    "UNKNOWN_CA": "the peer does not know the authority of our certificate",
    "WRONG_VERSION_NUMBER": "the peer does not speak TLS: both ends need tls-creds",
    "RECORD_LAYER_FAILURE": "the peer does not speak TLS: both ends need tls-creds",
    "HTTP_REQUEST": "the peer does not speak TLS: both ends need tls-creds",
}


def _said(error: ssl.SSLError) -> str:
    """OpenSSL's words without its source lines."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the peer's certificate was refused: {error.verify_message}"
    return (error.reason or str(error)).replace("_", " ").lower()


def _hint(error: ssl.SSLError) -> str:
    reason = error.reason or ""
    return next((hint for part, hint in _HINTS.items() if part in reason), "")
