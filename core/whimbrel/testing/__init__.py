"""Conformance suites for those who write plugins: inherit one, say how to make yours, and run pytest.

A suite's base class is not called `Test…`, so pytest collects what inherits from it and not the base itself. The
checks inside are plain functions that raise AssertionError and can be run without pytest. Nothing is skipped: what a
plugin declares is tested, and what it does not declare must fail cleanly.
"""

try:
    import pytest
except ImportError:  # the checks work without; their messages are shorter then
    pass
else:
    pytest.register_assert_rewrite(
        *(
            f"whimbrel.testing.{name}"
            for name in ("codecs", "guests", "trackers", "transports", "stored", "witnesses", "_bytes")
        )
    )
