"""The bundled guests under the conformance suite."""

from __future__ import annotations

from whimbrel.machine import LoopGuest, ProcessGuest
from whimbrel.testing.guests import GuestConformance, probe_of


class TestLoopGuest(GuestConformance):
    def make(self, ram):
        running = probe_of(ram)
        return LoopGuest(running.step, power_on=running.power_on, announce=running.announce)

    def make_with_drives(self, ram, drives):
        running = probe_of(ram, drives)
        return LoopGuest(running.step, power_on=running.power_on, announce=running.announce)


class TestProcessGuest(GuestConformance):
    memory = "memfd"

    def make(self, ram):
        return ProcessGuest("whimbrel.testing.guests:probe")

    def make_with_drives(self, ram, drives):
        return self.make(ram)
