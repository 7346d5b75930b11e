"""Descriptors that clients pass: names, bounds, who closes them and when; and the texts of a real QEMU."""

import array
import asyncio
import contextlib
import json
import os
import shutil
import socket
import subprocess
import threading

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from qemu.qmp import QMPClient

import whimbrel
from whimbrel.errors import MonitorError
from whimbrel.monitor import MonitorClient
from whimbrel.monitor.descriptors import MOST_AT_ONCE, MOST_NAMED, Descriptors

LONG = 20.0


class Passing:
    """Says things with descriptors over a raw connection, and can tell which of those are still held."""

    def __init__(self, client):
        self.client = client
        self._watched = []

    def say(self, command, *descriptors, **arguments):
        return self.send(json.dumps({"execute": command, "arguments": arguments}).encode(), *descriptors)

    def send(self, data, *descriptors):
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        assert self.client.socket.sendmsg([data], rights) == len(data)
        answer = self.client.value()
        return answer["error"]["desc"] if "error" in answer else answer["return"]

    def ends(self, count):
        """Writing ends of pipes, to be passed; `held` tells how many of them are still open anywhere."""
        pipes = [os.pipe() for _ in range(count)]
        self._watched += [read for read, _ in pipes]
        return [write for _, write in pipes]

    def held(self):
        left = []
        for read in self._watched:
            os.set_blocking(read, False)
            try:
                assert os.read(read, 1) == b""
                os.close(read)
            except BlockingIOError:
                left.append(read)
        self._watched = left
        return len(left)

    def close(self):
        for read in self._watched:
            os.close(read)


@pytest.fixture
def passing(make_machine, serve, raw, resources):
    """A raw client of a machine's monitor that can pass descriptors."""

    def connect(machine=None):
        made = Passing(raw(serve(machine or make_machine(busy=False)).address).negotiate())
        resources.callback(made.close)
        return made

    return connect


def give(passing, command, count=1, **arguments):
    """Pass fresh descriptors with a command; ours are closed at once."""
    ends = passing.ends(count)
    try:
        return passing.say(command, *ends, **arguments)
    finally:
        for end in ends:
            os.close(end)


# ---------------------------------------------------------------------------------------------------- a QEMU's replies


def script(say, descriptor):
    """What is asked of either; `say` passes the descriptors that it is given."""
    yield "without", say("getfd", fdname="x")
    yield "without a name", say("getfd")
    yield "a digit, without", say("getfd", fdname="1x")
    yield "a digit", say("getfd", descriptor, fdname="1x")
    yield "taken", say("getfd", fdname="y")
    yield "named", say("getfd", descriptor, fdname="x")
    yield "replaced", say("getfd", descriptor, fdname="x")
    yield "the empty name", say("getfd", descriptor, fdname="")
    yield "two at once", say("getfd", descriptor, descriptor, fdname="a")
    yield "two are one", say("getfd", fdname="b")
    yield "unasked", say("query-name", descriptor) and {}
    yield "named later", say("getfd", fdname="b")
    yield "a number", say("getfd", descriptor, fdname=7)
    yield "closed", say("closefd", fdname="x")
    yield "closed twice", say("closefd", fdname="x")
    yield "closed by number", say("closefd", fdname="5")
    yield "the empty one", say("closefd", fdname="")
    yield "to nowhere", say("migrate", uri="fd:nowhere")
    yield "to no name", say("migrate", uri="fd:")
    yield "to a number", say("migrate", uri="fd:99")
    yield "to half a number", say("migrate", uri="fd:9x")
    yield "to what was closed", say("migrate", uri="fd:x")
    yield "from nowhere", say("migrate-incoming", uri="fd:nowhere")
    yield "from no name", say("migrate-incoming", uri="fd:")


NOTHING = {}
WITHOUT = "No file descriptor supplied via SCM_RIGHTS"
DIGIT = "Parameter 'fdname' expects a name not starting with a digit"
OF_QEMU = {
    "without": WITHOUT,
    "without a name": "Parameter 'fdname' is missing",
    "a digit, without": WITHOUT,
    "a digit": DIGIT,
    "taken": WITHOUT,
    "named": NOTHING,
    "replaced": NOTHING,
    "the empty name": NOTHING,
    "two at once": NOTHING,
    "unasked": NOTHING,
    "named later": NOTHING,
    "a number": "Invalid parameter type for 'fdname', expected: string",
    "closed": NOTHING,
    "closed twice": "File descriptor named 'x' not found",
    "closed by number": "File descriptor named '5' not found",
    "the empty one": NOTHING,
    "to nowhere": "File descriptor named 'nowhere' has not been found",
    "to no name": "File descriptor named '' has not been found",
    "to a number": "File descriptor named '99' has not been found",
    "to half a number": "File descriptor named '9x' has not been found",
    "to what was closed": "File descriptor named 'x' has not been found",
    "from nowhere": "File descriptor named 'nowhere' has not been found",
    "from no name": "File descriptor named '' has not been found",
}


def test_the_replies_are_qemus(passing):
    one = passing()
    (descriptor,) = one.ends(1)
    answers = dict(script(one.say, descriptor))
    os.close(descriptor)
    # Of several that come at once it gives away the first and forgets the others; here they wait for their names.
    assert answers.pop("two are one") == NOTHING
    assert answers == OF_QEMU


@pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="there is no QEMU here")
def test_a_real_qemu_says_the_same(tmp_path):
    """Its own dialect is 7.2's; later ones may say more."""
    path = tmp_path / "qmp"
    command = ["qemu-system-x86_64", "-M", "none", "-display", "none", "-nodefaults", "-S", "-incoming", "defer"]
    ours, theirs = socket.socketpair()
    qmp = ["-chardev", f"socket,id=q,fd={theirs.fileno()}", "-mon", "chardev=q,mode=control"]
    with subprocess.Popen([*command, *qmp], pass_fds=[theirs.fileno()], stderr=subprocess.DEVNULL) as process:
        theirs.close()
        ours.settimeout(LONG)
        lines = ours.makefile("rb")

        def value():
            while "event" in (found := json.loads(lines.readline())):
                pass
            return found

        client = type("Client", (), {"socket": ours, "value": staticmethod(value)})
        try:
            version = value()["QMP"]["version"]["qemu"]
            one = Passing(client)
            assert one.send(b'{"execute": "qmp_capabilities"}') == {}
            (descriptor,) = one.ends(1)
            answers = dict(script(one.say, descriptor))
            os.close(descriptor)
        finally:
            process.kill()
            lines.close()
            ours.close()
    one.close()
    assert not path.exists()
    if (version["major"], version["minor"]) != (7, 2):
        pytest.skip(f"it is a {version['major']}.{version['minor']}")
    assert answers.pop("two are one") == WITHOUT
    # It is a destination, which may not migrate away.
    for name in [name for name in answers if name.startswith("to ")]:
        assert answers.pop(name) == "Guest is waiting for an incoming migration"
    assert answers == {name: said for name, said in OF_QEMU.items() if not name.startswith("to ")}


# ------------------------------------------------------------------------------------------------- who closes them


def test_nothing_is_held_that_nobody_has_named(passing):
    one = passing()
    assert give(one, "getfd", fdname="kept") == {}
    assert give(one, "getfd", fdname="1x").startswith("Parameter 'fdname'")
    assert one.held() == 1
    give(one, "query-name", 3)
    assert one.held() == 4  # they may still be named
    give(one, "query-name", 1)
    assert one.held() == 2
    assert one.say("getfd", fdname="other") == {}
    assert one.say("closefd", fdname="other") == {}
    assert one.held() == 1
    assert give(one, "getfd", fdname="kept") == {}
    assert one.held() == 1


def test_a_client_that_goes_takes_all_of_its_own_along(make_machine, passing, until):
    machine = make_machine(busy=False)
    one, other = passing(machine), passing(machine)
    give(one, "getfd", fdname="named")
    give(one, "query-name", 2)
    give(other, "getfd", fdname="named")
    assert (one.held(), other.held()) == (3, 1)
    assert one.say("migrate", uri="fd:none") == "File descriptor named 'none' has not been found"
    one.client.close()
    until(lambda: one.held() == 0, "its descriptors are closed")
    assert other.held() == 1
    assert other.say("closefd", fdname="named") == {}


def test_names_are_a_clients_own(make_machine, passing):
    machine = make_machine(busy=False)
    one, other = passing(machine), passing(machine)
    give(one, "getfd", fdname="x")
    assert other.say("closefd", fdname="x") == "File descriptor named 'x' not found"


def test_no_more_are_taken_at_once_than_are_allowed(passing):
    one = passing()
    give(one, "query-name", MOST_AT_ONCE + 30)
    assert one.held() == MOST_AT_ONCE


def test_no_more_are_named_than_are_allowed(passing):
    one = passing()
    for number in range(MOST_NAMED):
        assert give(one, "getfd", fdname=f"n{number}") == {}
    assert (
        give(one, "getfd", fdname="more")
        == f"there are {MOST_NAMED} named file descriptors already, the most there may be"
    )
    assert one.held() == MOST_NAMED
    assert give(one, "getfd", fdname="n0") == {}
    assert give(one, "getfd", fdname="n" * 256) == "Parameter 'fdname' expects a name of at most 255 characters"
    assert one.held() == MOST_NAMED


def test_they_are_no_childs(passing):
    """What waits or is named is closed on exec."""
    one = passing()
    give(one, "getfd", fdname="named")
    give(one, "query-name")
    with subprocess.Popen(["sleep", "1000"], close_fds=False) as child:
        one.say("closefd", fdname="named")
        assert one.say("getfd", fdname="named") == {}
        one.say("closefd", fdname="named")
        assert one.held() == 0
        child.kill()


def test_a_message_in_crumbs_has_its_descriptor(passing):
    one = passing()
    (end,) = one.ends(1)
    message = b'{"execute": "getfd", "arguments": {"fdname": "x"}}'
    socket.send_fds(one.client.socket, [message[:1]], [end])
    for at in range(1, len(message)):
        one.client.send(message[at : at + 1])
    assert one.client.value() == {"return": {}}
    os.close(end)
    assert one.held() == 1


def test_one_that_comes_ahead_of_its_command(passing):
    """As the library of QEMU's own tests passes them, with a blank."""
    one = passing()
    (end,) = one.ends(1)
    socket.send_fds(one.client.socket, [b" "], [end])
    os.close(end)
    assert one.say("getfd", fdname="x") == {}
    assert one.held() == 1


def test_the_library_of_qemu_passes_them(make_machine, serve):
    read, write = os.pipe()

    async def scenario():
        client = QMPClient("test")
        await client.connect(serve(make_machine(busy=False)).address.removeprefix("unix:"))
        client.send_fd_scm(write)
        await client.execute("getfd", {"fdname": "x"})
        os.close(write)
        await client.execute("closefd", {"fdname": "x"})
        await client.disconnect()

    asyncio.run(asyncio.wait_for(scenario(), LONG))
    assert os.read(read, 1) == b""
    os.close(read)


def test_over_tcp_there_are_none(make_machine, serve, connect):
    client = connect(serve(make_machine(busy=False), "tcp:127.0.0.1:0").address)
    with pytest.raises(MonitorError, match=WITHOUT):
        client.execute("getfd", fdname="x")
    with pytest.raises(MonitorError, match=r"a descriptor cannot be passed over tcp:.*; use a unix socket"):
        client.getfd("x", 1)
    assert client.execute("query-name") == {"name": "heat"}


# ---------------------------------------------------------------------------------------------------- and migrations


def test_a_machine_moves_over_a_socket_that_was_passed(make_machine, serve, connect):
    source, destination = make_machine(), make_machine()
    there, here = (connect(serve(machine).address) for machine in (source, destination))
    for client, end in zip((there, here), socket.socketpair(), strict=True):
        with end:
            client.getfd("link", end.fileno())
    here.execute("migrate-incoming", uri="fd:link")
    assert here.execute("query-migrate") == {}
    there.execute("cont")
    there.execute("migrate", uri="fd:link")
    # It has moved on: the name is nobody's any more, at once.
    for client in (there, here):
        with pytest.raises(MonitorError, match="File descriptor named 'link' not found"):
            client.execute("closefd", fdname="link")
    source.migration.wait(LONG)
    destination.migration.wait(LONG)
    assert there.execute("query-migrate")["status"] == "completed"
    assert here.execute("query-status")["running"]


def test_a_migration_that_is_refused_leaves_the_name(make_machine, serve, connect):
    machine = make_machine()
    client = connect(serve(machine).address)
    near, far = socket.socketpair()
    with near, far:
        client.getfd("link", near.fileno())
        machine.blockers.add("not today")
        with pytest.raises(MonitorError, match="not today"):
            client.execute("migrate", uri="fd:link")
        machine.power_on()
        machine.start()
        with pytest.raises(MonitorError, match=r"'-incoming' was not specified"):
            client.execute("migrate-incoming", uri="fd:link")
        with subprocess.Popen(["sleep", "1000"], close_fds=False) as child:
            near.close()
            client.execute("closefd", fdname="link")
            assert far.recv(1) == b""  # no child has it either
            child.kill()


def test_one_of_the_wrong_kind_is_gone_with_the_error(make_machine, serve, connect, tmp_path):
    machine = make_machine()
    client = connect(serve(machine).address)
    with (tmp_path / "file").open("w") as file:
        client.getfd("file", file.fileno())
    with pytest.raises(MonitorError, match="is a regular file; expected a socket or a pipe; write file:PATH"):
        client.execute("migrate-incoming", uri="fd:file")
    with pytest.raises(MonitorError, match="File descriptor named 'file' not found"):
        client.execute("closefd", fdname="file")


def test_a_migration_that_fails_closes_it(make_machine, serve, connect):
    machine = make_machine()
    client = connect(serve(machine).address)
    near, far = socket.socketpair()
    with near:
        client.getfd("link", near.fileno())
    machine.start()
    client.execute("migrate", uri="fd:link")
    client.execute("migrate_cancel")
    with pytest.raises(whimbrel.WhimbrelError):
        machine.migration.wait(LONG)
    with far:
        far.settimeout(LONG)
        while far.recv(1 << 16):
            pass


def test_a_destination_may_be_told_a_number_that_was_inherited_and_no_other(make_machine, serve, connect):
    machine = make_machine()
    client = connect(serve(machine).address)
    near, far = socket.socketpair()
    with near:
        with pytest.raises(MonitorError, match="was not passed to this process but is its own"):
            client.execute("migrate-incoming", uri=f"fd:{far.fileno()}")
        far.set_inheritable(True)
        client.execute("migrate-incoming", uri=f"fd:{far.detach()}")
        client.execute("migrate_cancel")
        assert near.recv(1) == b""


class Sessions(RuleBasedStateMachine):
    """One client's descriptors against a model: what is open is what waits and what is named, and nothing else."""

    def __init__(self):
        super().__init__()
        self.descriptors = Descriptors()
        self.waiting, self.named = [], {}
        self.reads = {}
        self.count = 0

    @rule(count=st.integers(0, 3))
    def come(self, count):
        pipes = [os.pipe() for _ in range(count)]
        if count:
            self.descriptors.came([write for _, write in pipes])
            self.waiting = [read for read, _ in pipes]
        self.reads.update(dict(pipes))

    @rule(name=st.sampled_from(["a", "b", "1", ""]))
    def getfd(self, name):
        if not self.waiting:
            with pytest.raises(MonitorError, match=WITHOUT):
                self.descriptors.name(name)
            return
        first = self.waiting.pop(0)
        if name == "1":
            with pytest.raises(MonitorError, match=DIGIT):
                self.descriptors.name(name)
        else:
            self.descriptors.name(name)
            self.named[name] = first

    @rule(name=st.sampled_from(["a", "b", ""]))
    def closefd(self, name):
        if name in self.named:
            self.descriptors.close(name)
            del self.named[name]
        else:
            with pytest.raises(MonitorError, match="not found"):
                self.descriptors.close(name)

    @rule(name=st.sampled_from(["a", "b", ""]), end=st.sampled_from(["taken", "refused", "taken and refused"]))
    def migrate(self, name, end):
        if name not in self.named:
            with (
                pytest.raises(MonitorError, match="has not been found"),
                self.descriptors.handed_over(f"fd:{name}", numbers=False),
            ):
                raise AssertionError
            return
        with contextlib.suppress(ZeroDivisionError), self.descriptors.handed_over(f"fd:{name}", numbers=True) as uri:
            number = int(uri.removeprefix("fd:"))
            assert os.get_inheritable(number)
            if "taken" in end:
                os.close(number)
                os.close(os.open("/dev/null", os.O_RDONLY))  # the number may mean something else meanwhile
            if "refused" in end:
                raise ZeroDivisionError
        if "taken" in end:
            del self.named[name]
        else:
            assert not os.get_inheritable(number)

    @rule(uri=st.sampled_from(["tcp:h:1", "fd", "nonsense", "fd:12"]))
    def migrate_elsewhere(self, uri):
        with self.descriptors.handed_over(uri, numbers=True) as handed:
            assert handed == uri

    @invariant()
    def what_is_open_is_what_is_known(self):
        for read in list(self.reads):
            os.set_blocking(read, False)
            try:
                is_open = os.read(read, 1) != b""
            except BlockingIOError:
                is_open = True
            assert is_open == (read in self.waiting or read in self.named.values())
            if not is_open:
                os.close(read)
                del self.reads[read]

    def teardown(self):
        self.descriptors.end()
        self.descriptors.end()
        self.waiting, self.named = [], {}
        self.what_is_open_is_what_is_known()
        assert not self.reads


TestSessions = Sessions.TestCase
TestSessions.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)


def test_two_clients_at_once_do_not_take_each_others(make_machine, serve):
    """Numbers are the process's; names and owners are not."""
    address = serve(make_machine(busy=False)).address
    failures = []

    def work(name):
        try:
            with MonitorClient.connect(address, LONG) as client:
                for _ in range(100):
                    read, write = os.pipe()
                    client.getfd(name, write)
                    os.close(write)
                    client.execute("closefd", fdname=name)
                    assert os.read(read, 1) == b""
                    os.close(read)
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=work, args=(f"n{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    assert not failures
