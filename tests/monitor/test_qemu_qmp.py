"""The library that QEMU's own tests use, as the client: everything it expects of a QEMU."""

import asyncio
import contextlib

import pytest
from qemu.qmp import EventListener, ExecuteError, QMPClient


@contextlib.asynccontextmanager
async def connected(address):
    client = QMPClient("test")
    scheme, _, rest = address.partition(":")
    host, _, port = rest.rpartition(":")
    await client.connect(rest if scheme == "unix" else (host, int(port)))
    try:
        yield client
    finally:
        await client.disconnect()


async def heard_until(listener, status):
    names = []
    async for message in listener:
        assert set(message["timestamp"]) == {"seconds", "microseconds"}
        names.append(message.get("data", {}).get("status") or message["event"])
        if names[-1] == status:
            return names
    raise AssertionError(names)


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_a_migration_from_end_to_end(transport, make_machine, serve):
    source, destination = make_machine(), make_machine()
    addresses = [serve(m, "tcp:127.0.0.1:0" if transport == "tcp" else None).address for m in (source, destination)]

    async def scenario():
        async with connected(addresses[0]) as at_source, connected(addresses[1]) as at_destination:
            assert at_source.greeting.QMP.version["qemu"]["major"] == 7
            wanted = {"capabilities": [{"capability": "events", "state": True}]}
            for client in (at_source, at_destination):
                await client.execute("migrate-set-capabilities", wanted)
            await at_source.execute("cont")
            await at_destination.execute("migrate-incoming", {"uri": "tcp:127.0.0.1:0"})
            (address,) = (await at_destination.execute("query-migrate"))["socket-address"]
            with at_source.listener(("STOP", "MIGRATION")) as left, at_destination.listener() as came:
                await at_source.execute("migrate", {"uri": f"tcp:{address['host']}:{address['port']}"})
                assert await heard_until(left, "completed") == ["setup", "active", "STOP", "completed"]
                heard = await heard_until(came, "completed")
                assert heard[-3:] == ["active", "RESUME", "completed"]
            info = await at_source.execute("query-migrate")
            assert info["status"] == "completed"
            assert info["ram"]["total"] == 1 << 20
            assert (await at_destination.execute("query-status"))["running"]

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_errors_carry_class_and_text(make_machine, serve):
    async def scenario():
        async with connected(serve(make_machine()).address) as client:
            with pytest.raises(ExecuteError) as caught:
                await client.execute("nothing")
            assert caught.value.error_class == "CommandNotFound"
            assert str(caught.value) == "The command nothing has not been found"
            with pytest.raises(ExecuteError, match="Parameter 'uri' is missing") as caught:
                await client.execute("migrate")
            assert caught.value.error_class == "GenericError"

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_commands_side_by_side_and_quit(make_machine, serve):
    quitting = []

    async def scenario():
        async with connected(serve(make_machine(), on_quit=lambda: quitting.append(True)).address) as client:
            names = await asyncio.gather(*(client.execute("query-name") for _ in range(50)))
            assert names == [{"name": "heat"}] * 50
            listener = EventListener(("SHUTDOWN",))
            with client.listen(listener):
                await client.execute("quit")
                event = await listener.get()
            assert event["data"] == {"guest": False, "reason": "host-qmp-quit"}

    asyncio.run(asyncio.wait_for(scenario(), 30))
    assert quitting == [True]
