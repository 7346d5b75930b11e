"""The command line: `whimbrel` and `python -m whimbrel`; one module per command.

Rules of this package: what takes long to import is imported inside the commands; commands raise errors and return their
exit status, and `whimbrel.cli.application` alone turns errors into sentences and statuses.
"""

from whimbrel.cli.application import main

__all__ = ["main"]
