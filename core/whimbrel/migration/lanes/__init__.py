"""The further connections of a migration (`multifd`): sent over, received from, told apart (wire format, section 5).

What goes over them is in `whimbrel.wire.multifd`; who puts pages on them and takes them off is a savevm handler,
through the contracts `DepartingLanes`, `ArrivingLanes` and `PageSink`. Each lane has a thread of its own.
"""

from whimbrel.migration.lanes.arriving import Arriving
from whimbrel.migration.lanes.bundle import Bundle
from whimbrel.migration.lanes.departing import Departing
from whimbrel.migration.lanes.gathering import Expected, Gathered, Gathering, accept
from whimbrel.migration.lanes.method import Method

__all__ = ["Arriving", "Bundle", "Departing", "Expected", "Gathered", "Gathering", "Method", "accept"]
