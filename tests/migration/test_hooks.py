"""Choices and notices: what plugins may decide, and what becomes of those that fail."""

from __future__ import annotations

import logging
import threading

import pytest

from whimbrel import RunState, hookimpl
from whimbrel.errors import ChannelLost, PluginError
from whimbrel.events import Arrived, MigrationFinished, StateChanged
from whimbrel.migration.switchover import Switchover

LONG = 60.0


@pytest.fixture
def build(churning):
    return churning({"a": 20, "b": 3})


class Chooses:
    def __init__(self, *answers):
        self.answers = list(answers)
        self.rounds = []

    @hookimpl
    def whimbrel_choose_switchover(self, round):  # noqa: A002
        self.rounds.append(round)
        answer = self.answers.pop(0) if self.answers else None
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.mark.parametrize(("answers", "rounds"), [([True], 1), ([False, False, True], 3), ([False] * 7 + [True], 8)])
def test_a_choice_decides(make_pair, build, settings, answers, rounds):
    chooses = Chooses(*answers)
    pair = make_pair(build, settings=settings, plugins=[chooses])
    pair.source.start()
    _, outgoing = pair.run()
    assert outgoing.info.rounds == rounds
    assert [round_.number for round_ in chooses.rounds] == list(range(1, rounds + 1))


def test_a_choice_may_switch_although_the_limit_says_no(make_pair, build, settings):
    settings.parameters.downtime_limit = 0
    chooses = Chooses(True)
    pair = make_pair(build, settings=settings, plugins=[chooses])
    pair.source.start()
    _, outgoing = pair.run()
    assert (outgoing.error, outgoing.info.rounds) == (None, 1)


def test_without_an_answer_the_core_decides(make_pair, build, settings):
    chooses = Chooses()
    pair = make_pair(build, settings=settings, plugins=[chooses])
    pair.source.start()
    _, outgoing = pair.run()
    assert outgoing.error is None
    rule = Switchover()
    assert [rule.due(round_) for round_ in chooses.rounds] == [False] * (len(chooses.rounds) - 1) + [True]


@pytest.mark.parametrize("answer", [ZeroDivisionError("a bug of the plugin's"), "perhaps", 1])
def test_a_choice_that_fails_ends_the_migration_while_that_is_free(make_pair, build, settings, answer):
    pair = make_pair(build, settings=settings, plugins=[Chooses(answer)])
    pair.source.start()
    incoming, outgoing = pair.run()
    assert isinstance(outgoing.error, PluginError)
    assert "whimbrel_choose_switchover" in str(outgoing.error)
    assert "Chooses" in str(outgoing.error)
    assert isinstance(incoming.error, ChannelLost)
    assert outgoing.info.error_code == "plugin"
    assert pair.source.run_state is RunState.RUNNING
    build.source.wait_steps(5)


# ---------------------------------------------------------------------------------------------------------- the notices


class Clumsy:
    def __init__(self):
        self.told = []

    @hookimpl
    def whimbrel_on_event(self, event):
        self.told.append(event)
        raise ValueError("clumsy")


@pytest.mark.parametrize("side", ["source", "destination"])
def test_a_notifier_that_raises_is_muted_and_listed_and_the_migration_goes_on(make_pair, build, settings, caplog, side):
    def broken(event):
        if isinstance(event, StateChanged):
            raise RuntimeError("not mine")

    clumsy = Clumsy()
    pair = make_pair(build, settings=settings)
    machine = getattr(pair, side)
    machine.plugins.register(clumsy)
    machine.notifiers.add(broken)
    with caplog.at_level(logging.CRITICAL, "whimbrel"):
        pair.source.start()
        incoming, outgoing = pair.run()
    assert (incoming.error, outgoing.error) == (None, None)
    info = (outgoing if side == "source" else incoming).info
    assert len(info.failed_notifiers) == 2
    assert "broken: not mine" in info.failed_notifiers[0]
    assert "Clumsy: " in info.failed_notifiers[1]
    assert len(clumsy.told) == 1
    other = (incoming if side == "source" else outgoing).info
    assert other.failed_notifiers == ()
    assert info.as_dict()["failed-notifiers"] == list(info.failed_notifiers)


def test_a_slow_notifier_does_not_slow_the_migration(make_pair, build, settings):
    pair = make_pair(build, settings=settings)
    go_on = threading.Event()

    def slow(event):
        assert go_on.wait(LONG)

    pair.source.notifiers.add(slow)
    pair.source.start()
    incoming, outgoing = pair.migrate()
    incoming.wait(LONG)
    outgoing.join()
    assert outgoing.status.finished  # although its first notice is still being told
    go_on.set()
    outgoing.wait(LONG)
    pair.source.notifiers.drain(LONG)
    assert any(isinstance(event, MigrationFinished) for event in pair.source_events)


def test_plugins_hear_what_notifiers_hear(make_pair, build, settings):
    class Ear:
        def __init__(self):
            self.told = []

        @hookimpl
        def whimbrel_on_event(self, event):
            self.told.append(event)

    ear = Ear()
    pair = make_pair(build, settings=settings)
    pair.destination.plugins.register(ear)
    pair.source.start()
    pair.run()
    assert ear.told == pair.destination_events
    assert any(isinstance(event, Arrived) for event in ear.told)
