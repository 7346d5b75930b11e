"""Writes the pages that are made from the code: states, settings, errors, the command line, the library.

    make docs                           writes them anew
    python docs/generate.py --check     writes nothing; exits 1 and names every page that is stale

A page is a function here that returns its text, the same for the same code. What only people can say (what a state
means, say) stands beside the function, and a state without its sentence is an error.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import attrs
import click

import whimbrel
from whimbrel import errors
from whimbrel.cli import application
from whimbrel.machine.runstate import MOVES, RunState
from whimbrel.migration import handover, status
from whimbrel.settings import Section, reference
from whimbrel.wire.form import Form

HERE: Final = Path(__file__).resolve().parent
MARK: Final = "<!-- Made from the code by docs/generate.py: change the code, then run `make docs`. -->\n\n"


def main(arguments: list[str]) -> int:
    """Write the pages, or with --check compare them."""
    stale = [name for name, page in PAGES.items() if _read(HERE / name) != MARK + page()]
    if "--check" in arguments:
        for name in stale:
            print(f"docs/{name} is stale: run `make docs`", file=sys.stderr)
        return 1 if stale else 0
    for name in stale:
        path = HERE / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(MARK + PAGES[name](), encoding="utf-8")
        print(f"docs/{name}")
    return 0


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


# ---------------------------------------------------------------------------------------------------------- states

_RUN_STATES: Final[Mapping[str, str]] = {
    "prelaunch": "built, and nothing has run yet; parts may still be added",
    "inmigrate": "waits for another machine to arrive",
    "running": "the guest runs",
    "paused": "the guest stands still, and may go on at any time",
    "finish-migrate": "the blackout: stopped for the last part of a migration, and still ours",
    "postmigrate": "let go of; it never runs here again by itself, only `reclaim()` makes it paused",
    "internal-error": "the guest's own code raised; `failure` has the exception",
    "shutdown": "closed; its memory is gone",
}
_STATUSES: Final[Mapping[str, str]] = {
    "none": "nothing was asked for yet",
    "setup": "the source connects, or the destination listens",
    "active": "rounds of memory are sent while the guest runs",
    "pre-switchover": "with `pause-before-switchover`: the guest is stopped and `migrate-continue` is awaited",
    "device": "with `pause-before-switchover`: the rest and the devices are sent",
    "completed": "it is done",
    "failed": "it is over without success; `error` says why",
    "cancelling": "somebody has cancelled it and it winds down",
    "cancelled": "it was cancelled, and the source's guest goes on",
}
_SOURCE: Final[Mapping[str, str]] = {
    "owner": "may run the machine",
    "frozen": "holds it still; may thaw",
    "prepared": "the destination has proved that it holds everything; holds still, and may thaw",
    "released": "never runs it again by itself, whatever happens",
    "done": "the destination has said that it runs",
}
_DESTINATION: Final[Mapping[str, str]] = {
    "loading": "loads it, and can undo that",
    "prepared": "holds it whole and still, and waits for the order",
    "owner": "may run it",
    "refused": "has thrown away what was loaded",
}


def states() -> str:
    """The page of all states and moves."""
    return "\n".join([
        "# States\n",
        "Five tables say what may follow what. Every move goes through one of them, a move that is not in its table",
        "raises `StateError`, and the diagrams below are drawn from them. The names are QEMU's where QEMU has one.\n",
        "A migration's *status* tells how far it is. Who may run the machine is another question, and",
        "[*ownership*](../concepts/handover.md) alone answers it.\n",
        "## Run states of a machine\n",
        "`machine.run_state`, a `whimbrel.RunState`; the table is `whimbrel.machine.runstate.MOVES`.\n",
        _diagram(MOVES, RunState.PRELAUNCH, _RUN_STATES),
        "## Status of an outgoing migration\n",
        "`machine.migrate(…).status`, a `whimbrel.MigrationStatus`; the table is",
        "`whimbrel.migration.status.SOURCE_MOVES`.\n",
        _diagram(status.SOURCE_MOVES, status.MigrationStatus.NONE, _STATUSES),
        "## Status of an incoming migration\n",
        "`machine.incoming(…).status`; the table is `whimbrel.migration.status.DESTINATION_MOVES`.\n",
        _diagram(status.DESTINATION_MOVES, status.MigrationStatus.NONE, _STATUSES),
        "## Ownership at the source\n",
        "In `MigrationInfo.ownership`; the table is `whimbrel.migration.handover.SOURCE_MOVES`.\n",
        _diagram(handover.SOURCE_MOVES, handover.SourceOwnership.OWNER, _SOURCE),
        _reasons(handover.SOURCE_MOVES),
        "## Ownership at the destination\n",
        "`machine.incoming(…).ownership`; the table is `whimbrel.migration.handover.DESTINATION_MOVES`.\n",
        _diagram(handover.DESTINATION_MOVES, handover.DestinationOwnership.LOADING, _DESTINATION),
        _reasons(handover.DESTINATION_MOVES),
    ])  # fmt: skip


def _diagram(moves: Mapping[Any, Iterable[Any]], start: Enum, meanings: Mapping[str, str]) -> str:
    order = list(type(start))
    lines = ["```mermaid", "stateDiagram-v2"]
    lines += [f'    state "{state.value}" as {_node(state)}' for state in order if state in moves]
    lines += [f"    [*] --> {_node(start)}"]
    for state in order:
        following = sorted(moves.get(state, ()), key=order.index)
        lines += [f"    {_node(state)} --> {_node(to)}" for to in following]
        if state in moves and not following:
            lines.append(f"    {_node(state)} --> [*]")
    lines += ["```", "", "| state | meaning | may become |", "| --- | --- | --- |"]
    for state in order:
        if state in moves:
            following = ", ".join(f"`{to.value}`" for to in sorted(moves[state], key=order.index))
            lines.append(f"| `{state.value}` | {meanings[state.value]} | {following} |")
    return "\n".join(lines) + "\n"


def _reasons(moves: Mapping[Any, Mapping[Any, Iterable[Enum]]]) -> str:
    lines = ["| move | because |", "| --- | --- |"]
    for old, following in moves.items():
        for new, reasons in following.items():
            why = "; or ".join(str(reason.value) for reason in sorted(reasons, key=list(handover.Reason).index))
            lines.append(f"| `{old.value}` to `{new.value}` | {why} |")
    return "\n".join(lines) + "\n"


def _node(state: Enum) -> str:
    return str(state.value).replace("-", "_")


# ---------------------------------------------------------------------------------------------------------- errors


def error_classes() -> str:
    """The page of errors: the tree with codes, exit statuses and meanings."""
    rows = [
        f"| `{kind.__name__}` | {f'`{kind.__base__.__name__}`' if depth and kind.__base__ else ''} "
        f"| `{kind.code}` | {kind.exit_code} | {_summary(kind)} |"
        for kind, depth in _family(errors.WhimbrelError)
    ]
    return "\n".join([
        "# Errors\n",
        "Everything that whimbrel raises on purpose is a `whimbrel.WhimbrelError`. The classes are in",
        "`whimbrel.errors`; what they mean to a caller is in [concepts/errors.md](../concepts/errors.md).\n",
        "A *code* never changes and never moves to another class: programs may compare `error.code`, and `--json`",
        "prints it as `error-code`. *Exit* is the status that the [command line](cli.md) ends with.\n",
        "| class | kind of | code | exit | meaning |",
        "| --- | --- | --- | --- | --- |",
        *rows,
        "",
    ])  # fmt: skip


def _family(kind: type[errors.WhimbrelError], depth: int = 0) -> Iterator[tuple[type[errors.WhimbrelError], int]]:
    yield kind, depth
    for child in kind.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from _family(child, depth + 1)


# ------------------------------------------------------------------------------------------------ the command line


def command_line() -> str:
    """The page of the command line, from its own help."""
    group = application.whimbrel
    statuses = re.findall(r"^(\d+) +(.+)$", application.__doc__ or "", re.MULTILINE)
    page = [
        "# The command line\n",
        "`whimbrel COMMAND --help` says the same. `python -m whimbrel` is the same program.\n",
        "Results go to standard output, everything else to standard error. Errors are one line, `whimbrel: …`, which",
        "says what to do; with `--json` there is an object with `error-code` and `error-desc` besides, and",
        "`whimbrel --debug COMMAND …` shows the traceback. `--qmp` may be left out where `WHIMBREL_QMP` is set.\n",
        "| exit | means |",
        "| --- | --- |",
        *(f"| {number} | {meaning} |" for number, meaning in statuses),
        "",
        "| for all commands | |",
        "| --- | --- |",
        *_options(group),
        "",
    ]  # fmt: skip
    for name, command in sorted(group.commands.items()):
        usage = " ".join(["whimbrel", name, *_pieces(command)])
        page += [f"## `{usage}`\n", _paragraphs(command), *_table(command)]
    return "\n".join(page)


def _pieces(command: click.Command) -> list[str]:
    required = [
        f"{p.opts[-1]} {_metavar(p)}" for p in command.params if isinstance(p, click.Option) and p.required
    ]  # fmt: skip
    return [*(_metavar(p) for p in command.params if isinstance(p, click.Argument)), *required]


def _metavar(parameter: click.Parameter) -> str:
    if parameter.metavar:
        return parameter.metavar
    if isinstance(parameter, click.Argument):
        return (parameter.name or "").upper()
    if isinstance(parameter.type, click.Choice):
        return "|".join(map(str, parameter.type.choices))
    return "NUMBER"


def _paragraphs(command: click.Command) -> str:
    blocks = inspect.cleandoc(command.help or "").split("\n\n")
    return "\n\n".join(" ".join(block.split()) for block in blocks) + "\n"


def _table(command: click.Command) -> list[str]:
    return ["| option | |", "| --- | --- |", *_options(command), ""]


def _options(command: click.Command) -> list[str]:
    return [_option(p) for p in command.params if isinstance(p, click.Option)]


def _option(option: click.Option) -> str:
    name = option.opts[-1] if option.is_flag else f"{option.opts[-1]} {_metavar(option)}"
    about = option.help or ""
    if option.required:
        about += " Needed."
    if option.show_default and option.default is not None:
        about += f" Default: `{option.default}`."
    return "| `{}` | {} |".format(name.replace("|", "\\|"), about.strip())  # or it would end the cell


# ------------------------------------------------------------------------------------------------------- the library

_PARTS: Final = (
    ("whimbrel.machine.ram", "Ram"),
    ("whimbrel.machine.devices", "Devices"),
    ("whimbrel.machine.blockers", "Blockers"),
    ("whimbrel.machine.notices", "Notices"),
)
_ATTRIBUTES: Final[Mapping[str, Mapping[str, str]]] = {
    "Machine": {
        "name": "What both ends must call it.",
        "uuid": "Compared by both ends if the capability `validate-uuid` is on.",
        "ram": "Its RAM blocks, a `Ram`.",
        "devices": "Its devices, a `Devices`.",
        "settings": "Its `Settings`.",
        "plugins": "Its `PluginManager`.",
        "blockers": "Reasons why it may not be migrated now, a `Blockers`.",
        "notifiers": "Who is told what happens, a `Notices`.",
        "failure": "Why its guest has ended, a `GuestError`, or None.",
    },
    "CapturedMachine": {
        "captured": "Its devices, a `whimbrel.capture.CapturedDevices`.",
        "guessed": "Whether the devices were told apart without a description and footers.",
        "ram": "Its RAM blocks, a `Ram`; what is written into them is sent on.",
        "uuid": "The one in its stream, or None.",
    },
}
_EXAMPLES: Final[Mapping[str, Callable[[], Any]]] = {  # of classes whose attributes are listed
    "Machine": lambda: whimbrel.Machine("docs"),
    "CapturedMachine": lambda: whimbrel.CapturedMachine("docs", Form(None)),
}
_FOR_THE_ENGINE: Final = frozenset({
    "check_may_change", "power_on", "expect_arrival", "freeze", "thaw", "let_go", "resume", "arrive",
    "new_dirty_tracker",
})  # fmt: skip
_MADE_BY_OTHERS: Final[Mapping[str, frozenset[str]]] = {  # classes that nobody calls, and methods that others call
    "CapturedMachine": frozenset({"complete", "ram_handler"}),
    "IncomingMigration": frozenset({"start"}),
    "OutgoingMigration": frozenset({"start"}),
    "RamBlock": frozenset({"take_marks"}),
    "Ram": frozenset({"close"}),
    "Devices": frozenset(),
    "Blockers": frozenset(),
    "Notices": frozenset({"emit", "held"}),
}
_SETTINGS_METHODS: Final = frozenset({"get", "set", "update", "as_dict", "copy"})
_MODULES: Final = (
    "whimbrel.abc",
    "whimbrel.capture",
    "whimbrel.capture.inspection",
    "whimbrel.capture.receiving",
    "whimbrel.errors",
    "whimbrel.events",
    "whimbrel.hookspecs",
    "whimbrel.monitor",
    "whimbrel.settings",
    "whimbrel.testing.faults",
    "whimbrel.testing.memory",
    "whimbrel.testing.pair",
    "whimbrel.testing.stored",
    "whimbrel.testing.trackers",
    "whimbrel.testing.transports",
    "whimbrel.vmstate",
)
_EXPANDED: Final = frozenset({
    "whimbrel.abc",
    "whimbrel.capture",
    "whimbrel.capture.inspection",
    "whimbrel.capture.receiving",
    "whimbrel.monitor",
    "whimbrel.testing.pair",
})  # fmt: skip
_NAMES: Final[Mapping[str, tuple[str, ...]]] = {  # of modules that have no list of their own
    "whimbrel.capture.receiving": ("Receipt", "Reception"),
}
_PLUMBING: Final = frozenset({"of"})
_MANY: Final = 8  # fields that are listed rather than shown as parameters


def library() -> str:
    """The page of public names, with signatures and first sentences."""
    page = [
        "# The library\n",
        "What is public: the names in `whimbrel` itself, and those in the modules listed at the end. A name that is",
        "not on this page is not for use. First sentences only; the docstrings have the rest: what is raised, on which",
        "thread a call may be made, and what is left behind after a failure.\n",
        "## `whimbrel`\n",
    ]
    for name in whimbrel.__all__:
        value = getattr(whimbrel, name)
        if inspect.isclass(value):
            page.append(_class(name, value))
        elif not isinstance(value, ModuleType):
            page.append(f"### `@{name}`\n\nMarks a function as the implementation of a [hook](../plugins.md).\n")
    modules = [f"[`{name}`](#{_anchor(f'whimbrel.{name}')})" for name in whimbrel.__all__ if _is_module(name)]
    page.append(f"### Modules\n\n`import whimbrel` brings {', '.join(modules)}; import the others by name.\n")
    page.append("## The parts of a machine\n\n`machine.ram`, `.devices`, `.blockers` and `.notifiers` are these.\n")
    page += [_class(name, getattr(importlib.import_module(module), name)) for module, name in _PARTS]
    page += [_module(name) for name in _MODULES]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(page))


def _class(name: str, kind: type) -> str:
    if issubclass(kind, Enum):
        return f"### `{name}`\n\n{_summary(kind)} One of {', '.join(f'`{m.value}`' for m in kind)}.\n"
    fields = _fields(kind)
    bare = len(fields) > _MANY or issubclass(kind, BaseException) or name in _MADE_BY_OTHERS
    lines = [f"### `{name if bare else name + _signature(kind)}`\n", f"{_summary(kind)}\n"]
    if len(fields) > _MANY:
        lines.append(f"Fields: {', '.join(f'`{field}`' for field in fields)}.\n")
    lines += [f"- `.{attribute}`: {about}" for attribute, about in _checked_attributes(name).items()]
    members = _members(kind)
    hidden = members.keys() & (_FOR_THE_ENGINE | _MADE_BY_OTHERS.get(name, frozenset()))
    if issubclass(kind, Section):
        hidden = set()
        members = {key: value for key, value in members.items() if key in _SETTINGS_METHODS}
    lines += [f"- {_member(kind, key)}" for key in members if key not in hidden]
    if hidden:
        lines.append(f"\nFor the engine and for plugins: {', '.join(f'`{key}`' for key in sorted(hidden))}.")
    return "\n".join(lines) + "\n"


def _member(kind: type, name: str) -> str:
    value = _members(kind)[name]
    called = "" if isinstance(value, property) else _signature(getattr(kind, name), drop_first=True)
    return f"`.{name}{called}`: {_summary(value)}"


def _fields(kind: type) -> list[str]:
    return [field.name for field in attrs.fields(kind) if field.init] if attrs.has(kind) else []


def _checked_attributes(name: str) -> Mapping[str, str]:
    attributes = _ATTRIBUTES.get(name, {})
    if attributes:
        with _EXAMPLES[name]() as machine:
            missing = [attribute for attribute in attributes if not hasattr(machine, attribute)]
        if missing:
            raise SystemExit(f"docs/generate.py: a {name} has no {', '.join(missing)}")
    return attributes


def _told(kind: type) -> Iterator[tuple[str, str]]:
    """Attributes that are made in `__init__` and have a docstring there."""
    for found in re.finditer(r'^ +self\.([a-z]\w*).*\n +"""(.*?)"""$', inspect.getsource(kind), re.MULTILINE):
        yield found[1], found[2]


def _members(kind: type) -> dict[str, Any]:
    """Public methods and properties that have a docstring, its own first, then what it inherits from ours."""
    found: dict[str, Any] = {}
    for base in kind.__mro__:
        if not base.__module__.startswith("whimbrel"):
            continue
        for attribute, value in vars(base).items():
            plain = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
            if not attribute.startswith("_") and (inspect.isfunction(plain) or isinstance(plain, property)):
                found.setdefault(attribute, value)
    return found


def _module(name: str) -> str:
    module = importlib.import_module(name)
    names = getattr(module, "__all__", ()) or _NAMES.get(name) or [n for n in vars(module) if n.startswith("whimbrel_")]
    lines = [f"## `{name}`\n", f"{_summary(module)}\n"]
    for public in sorted(names, key=str.lower):
        value = getattr(module, public)
        if inspect.isfunction(value):
            lines.append(f"- `{public}{_signature(value)}`: {_summary(value)}")
        elif inspect.isclass(value) and name != "whimbrel.errors":
            fields = f" Fields: {', '.join(f'`{field}`' for field in _fields(value))}." if _fields(value) else ""
            lines.append(f"- `{public}`: {_summary(value)}{fields}")
            if name in _EXPANDED and not issubclass(value, BaseException) and public not in whimbrel.__all__:
                lines += [f"    - `.{attribute}`: {about}" for attribute, about in _told(value)]
                lines += [f"    - {_member(value, key)}" for key in _members(value) if key not in _PLUMBING]
        elif inspect.isclass(value):
            lines.append(f"- `{public}`: {_summary(value)}")
        else:
            lines.append(f"- `{public}`")
    return "\n".join(lines) + "\n"


def _is_module(name: str) -> bool:
    return isinstance(getattr(whimbrel, name), ModuleType)


def _anchor(title: str) -> str:
    return title.replace(".", "").lower()


def _signature(value: Any, *, drop_first: bool = False) -> str:
    """The parameters as a caller sees them; without types, which the docstrings and the type checker have."""
    try:
        parameters = list(inspect.signature(value).parameters.values())
    except ValueError:
        return "()"
    if drop_first and parameters and parameters[0].name == "self":
        parameters = parameters[1:]
    parts: list[str] = []
    star = False
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            parts.append("*")
            star = True
        if parameter.kind is parameter.VAR_POSITIONAL:
            star = True
        prefix = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        parts.append(prefix + parameter.name + _default(parameter.default))
        if parameter.kind is parameter.POSITIONAL_ONLY and not any(
            p.kind is p.POSITIONAL_ONLY for p in parameters[parameters.index(parameter) + 1 :]
        ):
            parts.append("/")
    return f"({', '.join(parts)})"


def _default(value: object) -> str:
    if value is inspect.Parameter.empty:
        return ""
    if value is None or (isinstance(value, (bool, int, float, str, bytes, tuple)) and not isinstance(value, Enum)):
        return f"={value!r}"
    if isinstance(value, Enum) and value is not attrs.NOTHING:
        return f"={type(value).__name__}.{value.name}"
    return "=…"


# ------------------------------------------------------------------------------------------------------------ words


def _summary(value: Any) -> str:
    """The first paragraph of a docstring, as Markdown."""
    text = inspect.cleandoc(value.__doc__ or "").split("\n\n")[0]
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", " ".join(text.split())).replace("``", "`")
    return text.removesuffix("::").strip()


PAGES: Final[Mapping[str, Callable[[], str]]] = {
    "reference/states.md": states,
    "reference/settings.md": reference,
    "reference/errors.md": error_classes,
    "reference/cli.md": command_line,
    "reference/library.md": library,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
