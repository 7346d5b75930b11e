"""Streams whose pages come again and again, as records of every kind, and beside each the count of everything in it.

Like `streams`, written with `struct` alone.
"""

from __future__ import annotations

import struct
import zlib
from collections import Counter
from itertools import pairwise

import attrs

from . import streams
from .streams import END, EOS, PAGE, PART, Device, Script, page, str8, u16, u32, u64

KINDS = ("normal", "zero", "xbzrle", "compressed")
FLAGS = {"normal": 0x008, "zero": 0x002, "xbzrle": 0x040, "compressed": 0x100}

CONTENTS = [page(seed) for seed in range(4)]
CONTENTS += [bytes(PAGE), b"\1" * PAGE]
# One bit, in a few places: what a weak sum does not tell apart.
CONTENTS += [bytes(at) + b"\x80" + bytes(PAGE - 1 - at) for at in (7, 15, 2047, 4095)]


@attrs.define
class Count:
    """What a perfect reader knows of a stream when it has ended. Of each page: how often it came, and what last."""

    times: dict = attrs.field(factory=dict)
    last: dict = attrs.field(factory=dict)  # (kind, content or None)
    records: dict = attrs.field(factory=dict)
    bytes: Counter = attrs.field(factory=Counter)  # by block
    spent: Counter = attrs.field(factory=Counter)

    def blocks(self):
        """(name, pages by kind, distinct, passes, records by kind, bytes) of each block."""
        for name, times in self.times.items():
            last = [entry for entry in self.last[name] if entry is not None]
            kinds = Counter(kind for kind, _ in last)
            distinct = len({content for kind, content in last if kind == "normal"})
            yield name, dict.fromkeys(KINDS, 0) | kinds, distinct, max(times), self.records[name], self.bytes[name]

    def how_often(self):
        """Pairs of times and pages."""
        return sorted(Counter(number for times in self.times.values() for number in times).items())


def record(count, script, block, number, kind, content, *, name):
    """One record, counted."""
    payload = {
        "normal": content,
        "zero": b"\0",
        "xbzrle": b"\0\1" + content[:1],
        "compressed": zlib.compress(content, 1),
    }[kind]
    head = {"xbzrle": b"\1" + u16(len(payload)), "compressed": u32(len(payload))}.get(kind, b"")
    named = str8(block) if name else b""
    data = u64(number * PAGE | FLAGS[kind] | (0 if name else 0x020)) + named + head + payload
    count.times[block][number] += 1
    count.last[block][number] = kind, content if kind == "normal" else None
    count.records[block][kind] += 1
    count.bytes[block] += len(data)
    if kind == "zero":
        count.spent["zero"] += len(data)
    else:
        count.spent[{"normal": "pages"}.get(kind, kind)] += len(payload)
        count.spent["record_heads"] += len(data) - len(payload)
    script.data += data


def body(count, script, kind, records):
    """One body of records (block, page, kind, content)."""
    script.mark({PART: "PART", END: "END"}[kind])
    script.data += kind + u32(script.ram_id)
    for block, number, what, content in records:
        record(count, script, block, number, what, content, name=block != script.current)
        script.current = block
    script.data += EOS
    count.spent["record_heads"] += len(EOS)
    script._footer(script.ram_id)


def random_passes(dice, shape):
    """A stream of several passes over a few blocks; returns its script, whose `finish` gives it, and the count."""
    blocks = {name: dice.choice([1, 3, 40, 300]) for name in ["a", "b.ram", "n" * 255][: dice.randint(1, 3)]}
    script = Script(shape, blocks).header().start()
    count = Count(
        times={name: [0] * pages for name, pages in blocks.items()},
        last={name: [None] * pages for name, pages in blocks.items()},
        records={name: dict.fromkeys(KINDS, 0) for name in blocks},
        spent=Counter(record_heads=len(EOS)),
    )
    passes = dice.randint(1, 5)
    for number in range(passes):
        records = list(_one_pass(dice, blocks))
        while records and dice.random() < 0.4:  # in several sections
            some = dice.randint(0, len(records))
            body(count, script, PART, records[:some])
            records = records[some:]
        body(count, script, END if number == passes - 1 else PART, records)
    script.full(Device("timer", 4, b"1234"), Device("twin", 5, b"one"), Device("twin", 6, b"two", version=2))
    return script, count


def _one_pass(dice, blocks):
    weights = [dice.random() for _ in KINDS]
    steady = dice.choice([None, None, *KINDS])  # of one kind, as a first pass mostly is
    for name, pages in blocks.items():
        if dice.random() < 0.2:
            continue
        numbers = sorted(dice.sample(range(pages), dice.randint(0, pages)))
        if dice.random() < 0.2:
            dice.shuffle(numbers)  # as several threads compress them
        for number in numbers:
            kind = steady or dice.choices(KINDS, weights)[0]
            yield name, number, kind, dice.choice(CONTENTS)


def spans(script, what):
    """The bytes of all elements of that name."""
    edges = [*script.marks, (len(script.data), "end")]
    return sum(after - offset for (offset, mark), (after, _) in pairwise(edges) if mark == what)


def expected_breakdown(script, count):
    """Where the bytes of a finished stream went, by its marks, but for the records."""
    footer = 5 if script.shape.footers else 0
    bodies = [mark for _, mark in script.marks if mark in ("PART", "END")]
    listed = 8 + sum(len(str8(name)) + 8 + (8 if script.addresses is not None else 0) for name in script.ram)
    sections = len(bodies) * (5 + footer) + sum(len(device.head) + footer for device in script.devices)
    if "START" in dict(map(reversed, script.marks)):
        sections += len(streams.START + u32(0) + str8("ram") + struct.pack(">II", 0, 4)) + footer
    return {
        "header": spans(script, "header") + spans(script, "configuration"),
        "commands": spans(script, "command"),
        "section_heads": sections + 1,
        "block_list": listed,
        "record_heads": 0,
        "pages": 0,
        "zero": 0,
        "xbzrle": 0,
        "compressed": 0,
        "chunks": 0,
        "devices": sum(len(device.body) for device in script.devices),
        "description": spans(script, "description"),
        "behind": 0,
        "unread": 0,
    } | dict(count.spent)
