"""What all tests share: the head of the report."""

from hypothesis import HealthCheck, settings

from .qemu.peer import version


def pytest_report_header() -> str:
    """Say which QEMU tests/qemu is held against."""
    return f"QEMU: {version() or 'none'}"


# How long an example takes says more of the machine that it ran on than of the code.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")
