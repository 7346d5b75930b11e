"""sql: a witness in a table of a database, such as `sql:postgresql://db.example/witness`; needs `whimbrel[sql]`.

What follows `sql:` is an URL of SQLAlchemy. A cell is a row of the table `whimbrel_witness` with the attempt as its
primary key, so of two that insert one fails. What an insert or its commit returns is not asked for whose the cell is:
the answer to a commit may be lost. What a new, serializable transaction finds decides.

The table is made where it is missing; a file of SQLite too, 0600, but not its folder. One that is in memory is refused,
for nobody else sees it. A connection is made for each call and kept by nobody. Passwords of an URL are in no message.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Final, TypeVar

from whimbrel.abc import Patience
from whimbrel.errors import ConfigError, WitnessError
from whimbrel.hookspecs import hookimpl
from whimbrel.witness import CELL_MAX, MID_SIZE, Witness, WitnessSpec, cell, owner
from whimbrel_witnesses._hand import Hand

if TYPE_CHECKING:
    from sqlalchemy import URL, Connection, Engine

__all__ = ["SqlWitness", "whimbrel_witnesses"]

T = TypeVar("T")

_SQLITE_WAITS: Final = 60  # seconds for another's lock; whoever asked may wait less


@hookimpl
def whimbrel_witnesses() -> Sequence[WitnessSpec]:
    """Offer `sql`, whether or not SQLAlchemy is installed: who names it is told what is missing."""
    return [WitnessSpec(name="sql", summary="a table of a database (needs whimbrel[sql])", create=SqlWitness)]


class SqlWitness(Witness):
    """Cells in the database at `url`. Raises ConfigError also where SQLAlchemy or the database's driver is missing."""

    def __init__(self, url: str) -> None:
        self._engine, self._file = _engine(url)
        self._place = self._engine.url.render_as_string(hide_password=True)
        self._prepared = False
        self._hand = Hand()
        from sqlalchemy import Column, MetaData, String, Table

        self._table = Table(
            "whimbrel_witness",
            MetaData(),
            Column("mid", String(2 * MID_SIZE), primary_key=True),
            Column("cell", String(CELL_MAX), nullable=False),
        )

    def probe(self, patience: Patience) -> None:
        """Claim a cell of no attempt's twice, see that the first has it, and remove it."""
        self._do(self._probe, patience, "probed")

    def claim(self, mid: bytes, who: str, patience: Patience) -> str:
        """Insert a row of `who`, and see whose is there."""
        data = cell(mid, who)
        return self._do(lambda: self._claim(mid, data), patience, f"claimed for {who}")

    def read(self, mid: bytes, patience: Patience) -> str | None:
        """Whose is there."""
        if len(mid) != MID_SIZE:
            raise ValueError(f"the id of an attempt has {MID_SIZE} bytes, and this has {len(mid)}")
        return self._do(lambda: self._owner(mid), patience, "read")

    def close(self) -> None:
        """Let go of the engine, which holds no connection."""
        self._engine.dispose()

    # -------------------------------------------------------------------------- on the hand's thread

    def _do(self, call: Callable[[], T], patience: Patience, what: str) -> T:
        from sqlalchemy.exc import SQLAlchemyError

        def prepared() -> T:
            try:
                self._prepare()
                return call()
            except (SQLAlchemyError, OSError) as exc:
                raise WitnessError(
                    f"the witness in {self._place} cannot be {what}: {_said(exc)}",
                    hint="see that the database is there, and that this user may write the table whimbrel_witness",
                ) from exc

        return self._hand.do(prepared, patience, f"the witness in {self._place} is {what}")

    def _prepare(self) -> None:
        from sqlalchemy.exc import SQLAlchemyError

        if self._prepared:
            return
        if self._file is not None:
            os.close(os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        # The other side may be making it at this moment; whether it is there shows when it is used.
        with suppress(SQLAlchemyError), self._engine.begin() as connection:
            self._table.create(connection, checkfirst=True)
        self._prepared = True

    def _probe(self) -> None:
        mid = secrets.token_bytes(MID_SIZE)
        for who in ("first", "second"):
            found = self._claim(mid, cell(mid, who))
            if found != "first":
                raise WitnessError(f"{self._place} lets the second of two writers win: {found} did")
        with self._engine.begin() as connection:
            connection.execute(self._table.delete().where(self._table.c.mid == mid.hex()))

    def _claim(self, mid: bytes, data: bytes) -> str:
        from sqlalchemy.exc import SQLAlchemyError

        failed: Exception | None = None
        try:
            with self._engine.begin() as connection:
                self._insert(connection, mid, data)
        except (SQLAlchemyError, OSError) as exc:
            failed = exc  # or not: what is there tells
        found = self._owner(mid)
        if found is None:
            raise failed or WitnessError(f"the cell that was written to {self._place} is not there")
        return found

    def _insert(self, connection: Connection, mid: bytes, data: bytes) -> None:
        connection.execute(self._table.insert().values(mid=mid.hex(), cell=data.decode()))

    def _owner(self, mid: bytes) -> str | None:
        from sqlalchemy import select

        with self._engine.begin() as connection:
            row = connection.execute(select(self._table.c.cell).where(self._table.c.mid == mid.hex())).first()
        if row is None:
            return None
        data = row[0] if isinstance(row[0], bytes) else str(row[0]).encode(errors="replace")
        return owner(mid, data, self._place)


def _engine(address: str) -> tuple[Engine, str | None]:
    """An engine that keeps no connection, and the file of SQLite that is made if it is missing."""
    try:
        from sqlalchemy import create_engine
        from sqlalchemy.engine import make_url
        from sqlalchemy.exc import SQLAlchemyError
        from sqlalchemy.pool import NullPool
    except ModuleNotFoundError as exc:
        raise ConfigError("a witness in a database needs SQLAlchemy", hint="pip install 'whimbrel[sql]'") from exc
    try:
        url = make_url(address)
        sqlite = url.get_backend_name() == "sqlite"
        file = _file(url) if sqlite else None
        arguments = {"timeout": _SQLITE_WAITS} if sqlite else {}
        engine = create_engine(url, poolclass=NullPool, isolation_level="SERIALIZABLE", connect_args=arguments)
    except (SQLAlchemyError, ImportError, ValueError) as exc:
        # Its message may have the URL in it, and the password with it.
        raise ConfigError(
            f"a witness in a database needs an URL of SQLAlchemy whose driver is installed ({type(exc).__name__})",
            hint="such as sql:postgresql+psycopg://db.example/witness, or sql:sqlite:////mnt/shared/witness.db",
        ) from None
    return engine, file


def _file(url: URL) -> str | None:
    path = url.database or ""
    if path.startswith("file:") and url.query.get("mode") != "memory":
        return None  # SQLite's own way to say how it is opened
    if not path.startswith("/"):
        raise ConfigError(
            "a witness in SQLite needs a file that both sides can open, by its absolute path",
            hint="such as sql:sqlite:////mnt/shared/witness.db",
        )
    return path


def _said(exc: Exception) -> str:
    """What the driver says, without the statement."""
    text = str(getattr(exc, "orig", None) or exc)
    return text.splitlines()[0] if text else type(exc).__name__
