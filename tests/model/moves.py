"""Writes `moves.pml`: the tables of `whimbrel.migration.handover` for the model, which has no table of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from whimbrel.migration.handover import DESTINATION_MOVES, SOURCE_MOVES, Moves, Reason, Side

FILE: Final = Path(__file__).parent / "moves.pml"
PREFIXES: Final = ("S", "D")  # of the two sides, in the order in which they are numbered


class Move(NamedTuple):
    """One move: of which side, from where to where and why, by their names in the model."""

    side: str
    old: str
    new: str
    why: str


def moves() -> list[Move]:
    """Every move of both tables."""
    return [*_of("S", SOURCE_MOVES), *_of("D", DESTINATION_MOVES)]


def text() -> str:
    """What `moves.pml` has to be."""
    return "\n".join(_lines()) + "\n"


def names() -> dict[str, list[str]]:
    """The names that the model numbers from 1 on: of the ownerships at each side, and of the reasons."""
    sides = zip(PREFIXES, (SOURCE_MOVES, DESTINATION_MOVES), strict=True)
    return {
        **{prefix: [f"{prefix}_{each.name}" for each in table] for prefix, table in sides},
        "why": [each.name for each in Reason],
    }


def _of(prefix: str, table: Moves[Side]) -> Iterator[Move]:
    for old, targets in table.items():
        for new, reasons in targets.items():
            for why in sorted(reasons, key=list(Reason).index):
                yield Move(prefix, f"{prefix}_{old.name}", f"{prefix}_{new.name}", why.name)


def _lines() -> Iterator[str]:
    yield "/* Written by `python -m tests.model.moves` from core/whimbrel/migration/handover.py: not to be edited. */"
    for kind in names().values():
        yield ""
        yield from (f"#define {name} {number}" for number, name in enumerate(kind, 1))
    for prefix in PREFIXES:
        yield ""
        yield f"#define {prefix}_MOVES(old, new, why) (0 \\"
        for move in moves():
            if move.side == prefix:
                yield f"  || ((old) == {move.old} && (new) == {move.new} && (why) == {move.why}) \\"
        yield "  )"
    yield _COUNTED


_COUNTED: Final = """
/* Each move that was taken is counted beside the state, and told at the end: side, old, new, why. */
c_decl {
  static unsigned char took[2][8][8][32];
  static void tell(void) {
    int i, j, k, l;
    for (i = 0; i < 2; i++) for (j = 0; j < 8; j++) for (k = 0; k < 8; k++) for (l = 0; l < 32; l++)
      if (took[i][j][k][l]) printf("took %d %d %d %d\\n", i, j, k, l);
  }
  static void take(int side, int old, int new, int why) {
    static int first = 1;
    if (first) { first = 0; atexit(tell); }
    took[side][old][new][why] = 1;
  }
}
byte mv = 0;
#define s_move(to, why) \\
  mv = s; assert(S_MOVES(mv, to, why)); c_code { take(0, now.mv, to, why); }; mv = 0; s = to
#define d_move(m, to, why) \\
  mv = d[m]; assert(D_MOVES(mv, to, why)); c_code { take(1, now.mv, to, why); }; mv = 0; d[m] = to"""

if __name__ == "__main__":
    FILE.write_text(text())
