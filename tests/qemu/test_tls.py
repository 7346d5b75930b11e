"""TLS with a real QEMU at the other end: both ways, plain and with lanes, and who is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from whimbrel import CapturedMachine, Settings
from whimbrel.capture.receiving import Receipt, Reception
from whimbrel.capture.taking import CaptureUndecided
from whimbrel.errors import MigrationError

from ..security.authority import Authority, shared
from . import guests
from .peer import Qemu
from .qmp import PATIENCE
from .test_lanes import settings_for, waiting

MIB = 16
UNLIMITED = 1 << 40

pytestmark = pytest.mark.usefixtures("qemu_7_2")


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared().folder(tmp_path_factory.mktemp("tls") / "host", names=("localhost", "127.0.0.1"))


def settings_of(folder: Path, lanes: int = 0, **parameters: Any) -> Settings:
    settings = settings_for(lanes, "none") if lanes else Settings()
    settings.parameters.max_bandwidth = 0
    settings.parameters.tls_creds = str(folder)
    settings.parameters.update(parameters)
    return settings


class Two:
    """QEMUs with credentials of their own."""

    def __init__(self, qemu: Callable[..., Qemu]) -> None:
        self._qemu = qemu

    def source(self, folder: Path, *capabilities: str, lanes: int = 0) -> Qemu:
        made = self._begun(folder, "client", lanes, guest=guests.sweep(MIB))
        made.switch_on(*capabilities)
        made.execute("migrate-set-parameters", max_bandwidth=UNLIMITED, downtime_limit=60_000)
        made.wait_started()
        return made

    def destination(self, folder: Path, *, lanes: int = 0, authz: str = "") -> Qemu:
        more = ["-object", f"authz-simple,id=who,identity={authz.replace(',', ',,')}"] if authz else []
        made = self._begun(folder, "server", lanes, guest=guests.sweep(MIB), incoming="defer", extra=more)
        if authz:
            made.execute("migrate-set-parameters", tls_authz="who")
        return made

    def _begun(self, folder: Path, end: str, lanes: int, *, extra: list[str] | None = None, **more: Any) -> Qemu:
        creds = f"tls-creds-x509,id=tls0,dir={folder},endpoint={end},verify-peer=on"
        made = self._qemu(MIB, extra=["-object", creds, *(extra or [])], **more)
        made.execute("migrate-set-parameters", tls_creds="tls0")
        if lanes:
            made.switch_on("multifd")
            made.execute("migrate-set-parameters", multifd_channels=lanes)
        return made


@pytest.fixture
def two(qemu: Callable[..., Qemu]) -> Two:
    return Two(qemu)


def received(origin: Qemu, folder: Path, settings: Settings, file: Path, host: str = "127.0.0.1") -> Any:
    reception = Reception(f"tcp:{host}:0", file, settings=settings)
    with waiting(reception) as came:
        origin.migrate(reception.uri)
        origin.status = origin.wait_status("completed", "failed")
        if origin.status == "failed":
            reception.cancel()
    return came[0]


@pytest.mark.parametrize("lanes", [0, 2])
def test_out_of_a_qemu(two: Two, host: Path, tmp_path: Path, lanes: int) -> None:
    origin = two.source(host, lanes=lanes)
    settings = settings_of(host, lanes, tls_authz="client")
    came = received(origin, host, settings, tmp_path / "machine")
    assert isinstance(came, Receipt), came
    assert origin.status == "completed"
    with CapturedMachine.load(tmp_path / "machine") as stored:
        assert same_ram_of(stored, origin)


def same_ram_of(machine: CapturedMachine, origin: Qemu) -> bool:
    from .test_lanes import digest

    return digest(machine.ram["pc.ram"].view.tobytes()) == digest(origin.memory(0, MIB << 20))


@pytest.mark.parametrize("lanes", [0, 2])
def test_into_a_qemu(two: Two, host: Path, tmp_path: Path, lanes: int) -> None:
    origin = two.source(host)
    came = received(origin, host, settings_of(host), tmp_path / "machine")
    assert isinstance(came, Receipt), came
    destination = two.destination(host, lanes=lanes, authz="CN=client")
    destination.execute("migrate-incoming", uri="tcp:127.0.0.1:0")
    uri = listening(destination)
    with CapturedMachine.load(tmp_path / "machine", settings=settings_of(host, lanes)) as machine:
        migration = machine.migrate(uri)
        migration.wait(PATIENCE)
        assert migration.info.ownership == "done"
    destination.serial.wait_more()


def listening(destination: Qemu) -> str:
    address = destination.execute("query-migrate")["socket-address"][0]
    return f"tcp:{address['host']}:{address['port']}"


def test_a_qemu_hangs_up_without_a_word(two: Two, host: Path, tmp_path: Path) -> None:
    """One that asks for an answer lets go when it has it, and its end of TLS cannot be told from a cut."""
    origin = two.source(host, "return-path")
    came = received(origin, host, settings_of(host), tmp_path / "machine")
    assert isinstance(came, CaptureUndecided | MigrationError), came
    assert "without the goodbye" in str(came)


def test_that_may_be_asked_for(two: Two, host: Path, tmp_path: Path) -> None:
    origin = two.source(host, "return-path")
    settings = settings_of(host)
    settings.security.unfinished_tls = True
    came = received(origin, host, settings, tmp_path / "machine")
    assert isinstance(came, Receipt), came
    assert came.told


# ------------------------------------------------------------------------------------------------ who is refused


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Path]:
    numbers = iter(range(9))
    return lambda by=None, **more: (by or shared()).folder(
        tmp_path / f"host-{next(numbers)}", **{"names": ("localhost", "127.0.0.1"), **more}
    )


def test_a_qemu_of_another_authority(two: Two, host: Path, made: Callable[..., Path], tmp_path: Path) -> None:
    origin = two.source(made(by=Authority("somebody else")))
    came = received(origin, host, settings_of(host), tmp_path / "machine")
    assert isinstance(came, MigrationError)
    assert origin.status == "failed"
    assert not (tmp_path / "machine").exists()


def test_a_name_that_is_not_ours(two: Two, made: Callable[..., Path], tmp_path: Path) -> None:
    here = made(names=("elsewhere",))
    origin = two.source(here)
    assert isinstance(received(origin, here, settings_of(here), tmp_path / "machine"), MigrationError)
    assert origin.status == "failed"
    origin.execute("migrate-set-parameters", tls_hostname="elsewhere")
    assert isinstance(received(origin, here, settings_of(here), tmp_path / "machine"), Receipt)


@pytest.mark.parametrize("missing", ["certificate", "permission", "tls"])
def test_a_qemu_that_is_not_allowed(
    two: Two, host: Path, made: Callable[..., Path], tmp_path: Path, missing: str
) -> None:
    origin = two.source(made(client=None) if missing == "certificate" else host)
    if missing == "tls":
        origin.execute("migrate-set-parameters", tls_creds="")
    settings = settings_of(host, tls_authz="somebody" if missing == "permission" else "")
    came = received(origin, host, settings, tmp_path / "machine")
    assert isinstance(came, MigrationError)
    assert not (tmp_path / "machine").exists()


@pytest.mark.parametrize("wrong", ["authority", "name", "permission"])
def test_a_qemu_refuses_and_is_refused(
    two: Two, host: Path, made: Callable[..., Path], tmp_path: Path, wrong: str
) -> None:
    origin = two.source(host)
    assert isinstance(received(origin, host, settings_of(host), tmp_path / "machine"), Receipt)
    ours = made(by=Authority("somebody else")) if wrong == "authority" else host
    more = {"tls_hostname": "elsewhere"} if wrong == "name" else {}
    destination = two.destination(host, authz="CN=somebody" if wrong == "permission" else "")
    destination.execute("migrate-incoming", uri="tcp:127.0.0.1:0")
    with CapturedMachine.load(tmp_path / "machine", settings=settings_of(ours, **more)) as machine:
        migration = machine.migrate(listening(destination))
        with pytest.raises(MigrationError):
            migration.wait(PATIENCE)
        assert migration.info.ownership == "owner"
