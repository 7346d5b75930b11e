"""The child: `python -m whimbrel.machine.process ORDERS REPORTS PARENT`, started by `ProcessGuest` alone."""

import sys

from whimbrel.machine.process.child import main

if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
