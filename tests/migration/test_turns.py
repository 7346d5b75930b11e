"""Whose turn it is to send: by bytes, none starves, and nobody waits for one that has nothing."""

import pytest

from whimbrel.migration.turns import QUANTUM, Turn, Turns


class Sender:
    """Sends pieces of `piece` bytes, whatever its turn says, as long as it is ready."""

    def __init__(self, name, piece, *, ready=lambda: True):
        self.name, self.piece, self.ready = name, piece, ready
        self.sent = 0

    def take(self, turn, budget):
        while not turn.over() and self.ready():
            budget.left -= self.piece
            self.sent += self.piece


class Budget:
    def __init__(self, left):
        self.left = left

    def bytes_left(self):
        return self.left

    def over(self):
        return self.left <= 0


def run(senders, *, slices, size):
    """As a saver does: in each slice, turns until it is over."""
    turns = Turns()
    order = []
    for _ in range(slices):
        budget = Budget(size)
        while not budget.over():
            sender, turn = turns.next(senders, budget)
            sender.take(turn, budget)
            turns.taken(sender, turn)
            order.append(sender.name)
    return order


@pytest.mark.parametrize("size", [100_000, 1 << 20, 16 << 20, 1 << 40])
@pytest.mark.parametrize("pieces", [(1 << 20, 4104), (4104, 1 << 20), (1 << 20, 1 << 20), (8 << 20, 65536)])
def test_two_that_always_have_something_share_by_bytes(size, pieces):
    slices = max(8, min(600, (1 << 26) // size))
    first, second = (Sender(name, piece) for name, piece in zip("ab", pieces, strict=True))
    if size > 1 << 30:
        # One slice without a limit, as long as it lasts.
        turns, budget = Turns(), Budget(1 << 62)
        for _ in range(20):
            sender, turn = turns.next([first, second], budget)
            sender.take(turn, budget)
            turns.taken(sender, turn)
    else:
        run([first, second], slices=slices, size=size)
    assert abs(first.sent - second.sent) <= QUANTUM + max(pieces)


def test_large_pieces_do_not_starve_the_other_where_the_limit_is_low():
    drives, ram = Sender("drives", 1 << 20), Sender("ram", 4104)
    run([drives, ram], slices=300, size=100_000)
    assert ram.sent > 10 << 20
    assert drives.sent > 10 << 20


def test_one_alone_has_the_whole_slice():
    turns, budget, alone = Turns(), Budget(5), Sender("a", 1)
    assert turns.next([alone], budget) == (alone, budget)
    turns.taken(alone, budget)


def test_who_is_not_ready_is_not_waited_for_and_catches_up_with_nobody():
    waiting = [False]
    disk = Sender("disk", 1 << 20, ready=lambda: not waiting[0])
    ram = Sender("ram", 1 << 20)
    turns = Turns()

    def one():
        budget = Budget(QUANTUM)
        sender, turn = turns.next([disk, ram], budget)
        sender.take(turn, budget)
        turns.taken(sender, turn)
        return sender.name

    waiting[0] = True
    assert [one() for _ in range(10)] == ["ram"] * 10
    waiting[0] = False
    names = [one() for _ in range(20)]
    assert names.count("disk") == names.count("ram") == 10


def test_if_nobody_is_ready_the_first_is_asked_all_the_same():
    turns, budget = Turns(), Budget(5)
    senders = [Sender("a", 1, ready=lambda: False), Sender("b", 1, ready=lambda: False)]
    assert turns.next(senders, budget)[0] is senders[0]


def test_a_turn_is_over_with_the_slice_or_with_its_own_limit():
    budget = Budget(100)
    turn = Turn(budget, 30)
    assert (turn.bytes_left(), turn.over()) == (30, False)
    budget.left -= 29
    assert (turn.bytes_left(), turn.used, turn.over()) == (1, 29, False)
    budget.left -= 2
    assert (turn.used, turn.over()) == (31, True)
    short = Turn(budget, 1000)
    budget.left = 0
    assert short.over()
