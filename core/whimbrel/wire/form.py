"""What a stream consists of around its sections: a property of the machine's type, never of the program that sends it.

========== ============= ======= ===========
type       configuration footers description
========== ============= ======= ===========
up to 2.2  no            no      no
2.3        no            no      yes
from 2.4   yes           yes     yes, unless suppressed
========== ============= ======= ===========

Wire format, section 1.5.
"""

from __future__ import annotations

import attrs

from whimbrel.wire.skeleton import Configuration


@attrs.frozen
class Form:
    """The form of one machine's streams.

    `configuration` is None where there is none. `description` says whether one follows the end; `text` is that
    description as it came from elsewhere, or None to make it of what the devices say of themselves.
    """

    configuration: Configuration | None
    footers: bool = True
    description: bool = True
    text: bytes | None = attrs.field(default=None, repr=False)
