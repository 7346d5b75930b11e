"""Reader and Writer over a Channel: buffers, pacing, sticky errors. What the bytes mean is not known here."""

from whimbrel.stream.forwarding import ForwardingChannel
from whimbrel.stream.pacing import Pacer
from whimbrel.stream.reader import Reader
from whimbrel.stream.replay import Replay
from whimbrel.stream.tapped import TappedReader, TappedWriter
from whimbrel.stream.writer import Writer

__all__ = ["ForwardingChannel", "Pacer", "Reader", "Replay", "TappedReader", "TappedWriter", "Writer"]
