"""One side of a TCP connection between two network namespaces, for `test_silence.py`: says on its output how it ended.

`silent_host.py listen` waits for a peer at 10.83.0.1 and then for bytes that do not come; `silent_host.py send`
connects there and sends until nobody takes it any more.
"""

from __future__ import annotations

import sys

from whimbrel import PluginManager, Settings
from whimbrel.abc import Patience
from whimbrel.errors import ChannelLost
from whimbrel.migration.uri import resolve

URI = "tcp:10.83.0.1:4444"


def main() -> None:
    """Connect, say so, and say what became of it."""
    settings = Settings()
    settings.security.insecure_plaintext = True
    settings.limits.keepalive = 1.0
    settings.limits.peer_timeout = 1.0
    destination = resolve(URI, PluginManager())
    if sys.argv[1] == "listen":
        listener = destination.listen(settings)
        print("listens", flush=True)
        channel = listener.accept(Patience(60.0))
    else:
        channel = destination.connector(settings).connect(Patience(60.0))
    print("connected", flush=True)
    sys.stdin.readline()  # the link is down
    try:
        if sys.argv[1] == "listen":
            channel.recv_into(bytearray(1))
        else:
            while True:
                channel.send(bytes(1 << 20))
    except ChannelLost as exc:
        print(exc, flush=True)


if __name__ == "__main__":
    main()
