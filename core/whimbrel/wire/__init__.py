"""QEMU's migration stream as pure bytes: values in, bytes out, and back.

Rules of this room: no socket, thread, clock or log; nothing is allocated because a peer said so; what a peer sent
is checked before it multiplies or indexes. Encoders return bytes. Decoders are generators that ask for bytes
(`whimbrel.abc.Parser`), so each can be fed whole, byte by byte or from a socket; pages alone are read in batches,
as numpy views of whatever is buffered (`whimbrel.wire.ram`).

All numbers are big-endian. Section numbers in docstrings are those of `docs/reference/wire-format.md`.
"""
