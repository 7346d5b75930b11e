"""userfaultfd(2) with asynchronous write-protection: the kernel notes who writes and lets them go on.

Sources: userfaultfd(2), ioctl_userfaultfd(2), Documentation/admin-guide/mm/userfaultfd.rst and pagemap.rst.

Three features must be asked for in the handshake. WP_ASYNC (Linux 6.7): a write to a protected page is not stopped
and nobody has to answer; the protection falls, and that is the mark. WP_UNPOPULATED: pages that do not exist yet are
protected too; without it the first write to one would go unnoticed. WP_HUGETLBFS_SHMEM: shared memory as well.
Files on disks need no feature: with WP_ASYNC alone any memory can be registered.

Every failure leaves here as TrackerUnavailable with one sentence that says why.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from contextlib import suppress
from typing import TYPE_CHECKING

from whimbrel.errors import TrackerUnavailable
from whimbrel.machine import libc
from whimbrel.machine.pagemap import PAGE_IS_WRITTEN, PAGEMAP, PM_SCAN_CHECK_WPASYNC, PM_SCAN_WP_MATCHING, Pagemap

if TYPE_CHECKING:
    from collections.abc import Iterator

    from whimbrel.machine.pagemap import RegionArray

_NUMBERS = {
    "x86_64": 323,
    "aarch64": 282,
    "riscv64": 282,
    "loongarch64": 282,
    "s390x": 355,
    "ppc64le": 364,
    "ppc64": 364,
}
"""The system call's number, per machine as uname(2) calls it."""

_USER_MODE_ONLY = 1  # lets the unprivileged use it; no fault of the kernel's is ever held up here
_API = 0xAA
_FEATURE_WP_HUGETLBFS_SHMEM = 1 << 12
_FEATURE_WP_UNPOPULATED = 1 << 13
_FEATURE_WP_ASYNC = 1 << 15
_FEATURES = _FEATURE_WP_HUGETLBFS_SHMEM | _FEATURE_WP_UNPOPULATED | _FEATURE_WP_ASYNC
_REGISTER_MODE_WP = 1 << 1
_WRITEPROTECT_MODE_WP = 1 << 0

_UFFDIO_API = 0xC018AA3F
_UFFDIO_REGISTER = 0xC020AA00
_UFFDIO_UNREGISTER = 0x8010AA01
_UFFDIO_WRITEPROTECT = 0xC018AA06

_TOO_OLD = "this kernel's userfaultfd cannot note writes by itself; Linux 6.7 and later can"


class Userfault:
    """An open userfaultfd with a pagemap beside it. One thread at a time; closing it ends all protection.

    It is about the memory of the process that opened both, this one, or another that has passed its `descriptors` (from
    `open_descriptors`); then all addresses are that process's. They belong to the Userfault from the call on.
    Raises TrackerUnavailable where the kernel does not have it or does not allow it.
    """

    def __init__(self, descriptors: tuple[int, int] | None = None) -> None:
        self._file, pagemap = open_descriptors() if descriptors is None else descriptors
        self._pagemap = Pagemap(file=pagemap)
        try:
            self._handshake()
        except BaseException:
            self.close()
            raise

    def _handshake(self) -> None:
        try:
            fcntl.ioctl(self._file, _UFFDIO_API, struct.pack("=3Q", _API, _FEATURES, 0))
        except OSError as exc:
            if exc.errno == errno.EINVAL:
                raise TrackerUnavailable(_TOO_OLD) from exc
            raise TrackerUnavailable(f"the handshake with userfaultfd failed: {exc.strerror}") from exc

    def register(self, start: int, end: int) -> None:
        """Bring the memory from address `start` to `end` under this userfaultfd; nothing is protected yet."""
        try:
            fcntl.ioctl(self._file, _UFFDIO_REGISTER, struct.pack("=4Q", start, end - start, _REGISTER_MODE_WP, 0))
        except OSError as exc:
            reasons = {
                errno.EBUSY: "another userfaultfd tracks this memory already",
                errno.EINVAL: "this kind of memory cannot be write-protected on this kernel",
                errno.EPERM: "this memory is sealed against it",
            }
            raise TrackerUnavailable(
                reasons.get(exc.errno or 0, f"the memory cannot be registered: {exc.strerror}")
            ) from exc

    def check_there(self, start: int, end: int) -> None:
        """Raise TrackerUnavailable if registered memory has gone, with its process or without.

        A scan of a process that has ended finds nothing and fails at nothing. So whoever scans another process's
        memory asks this *behind* the scan: what was there then, was there before.
        """
        # To register again what is registered already changes nothing, and fails where there is nothing any more.
        self.register(start, end)

    def unregister(self, start: int, end: int) -> None:
        """End all protection from address `start` to `end`; memory that is gone meanwhile is fine."""
        with suppress(OSError):  # it was unmapped: there is nothing left to end
            fcntl.ioctl(self._file, _UFFDIO_UNREGISTER, struct.pack("=2Q", start, end - start))

    def protect(self, start: int, end: int, *, on: bool = True) -> None:
        """Protect all pages from address `start` to `end`, those too that do not exist yet; or no page, if not `on`.

        What was written before is forgotten with it.
        """
        argument = struct.pack("=3Q", start, end - start, _WRITEPROTECT_MODE_WP if on else 0)
        while True:
            try:
                fcntl.ioctl(self._file, _UFFDIO_WRITEPROTECT, argument)
            except OSError as exc:
                if exc.errno not in {errno.EAGAIN, errno.EINTR}:
                    raise TrackerUnavailable(f"the memory cannot be write-protected: {exc.strerror}") from exc
            else:
                return

    def written(self, start: int, end: int) -> Iterator[RegionArray]:
        """Yield the ranges of pages written since they were protected, and protect them again in the same breath.

        Arrays as `Pagemap.scan` yields them. A failure half way may have forgotten writes: the tracking is over then.
        """
        # With exactly these masks the kernel takes its short way, on which a page that has gone (given back, or
        # written out to its file) counts as written on every kernel; on the long way it does not on some.
        return self._scan(start, end, mask=PAGE_IS_WRITTEN, report=PAGE_IS_WRITTEN)

    def protect_reporting(self, start: int, end: int, report: int) -> Iterator[RegionArray]:
        """Protect pages and yield, for each range of them, the categories in `report` it had when it was protected."""
        return self._scan(start, end, mask=0, report=report)

    def _scan(self, start: int, end: int, mask: int, report: int) -> Iterator[RegionArray]:
        try:
            yield from self._pagemap.scan(
                start, end, mask=mask, report=report, flags=PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC
            )
        except OSError as exc:
            if exc.errno == errno.ENOTTY:
                raise TrackerUnavailable("this kernel has no PAGEMAP_SCAN; Linux 6.7 and later have it") from exc
            raise TrackerUnavailable(f"the kernel lost track of writes: {exc.strerror}") from exc

    def close(self) -> None:
        """Close both descriptors; twice is fine."""
        self._pagemap.close()
        descriptor, self._file = self._file, -1
        if descriptor >= 0:
            os.close(descriptor)


def open_descriptors() -> tuple[int, int]:
    """Open a userfaultfd and a pagemap of this process; raises TrackerUnavailable, leaving nothing open."""
    userfault = _open()
    try:
        return userfault, os.open(PAGEMAP, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as exc:
        os.close(userfault)
        raise TrackerUnavailable(f"{PAGEMAP} cannot be opened: {exc.strerror}") from exc


def _open() -> int:
    machine = os.uname().machine
    if machine not in _NUMBERS:
        raise TrackerUnavailable(f"whimbrel does not know userfaultfd's number on {machine}")
    try:
        return libc.userfaultfd(_NUMBERS[machine], os.O_CLOEXEC | os.O_NONBLOCK | _USER_MODE_ONLY)
    except OSError as exc:
        reasons = {
            errno.ENOSYS: "this kernel has no userfaultfd",
            errno.EPERM: "userfaultfd is not permitted here; a container's seccomp profile may forbid it",
            errno.EINVAL: _TOO_OLD,
        }
        raise TrackerUnavailable(reasons.get(exc.errno or 0, f"userfaultfd cannot be opened: {exc.strerror}")) from exc
