"""What all tests share: the head of the report."""

from .qemu.peer import version


def pytest_report_header() -> str:
    """Say which QEMU tests/qemu is held against."""
    return f"QEMU: {version() or 'none'}"
