"""What a migration may do without: the settings that make a link less safe, each asked for by name."""

from __future__ import annotations

import attrs

from whimbrel.settings.kinds import Flag, setting
from whimbrel.settings.section import Section, judged

__all__ = ["Security"]


@attrs.define(kw_only=True, on_setattr=judged)
class Security(Section):
    """What is refused unless it is asked for here; counts from the start of a migration, and is logged each time."""

    insecure_plaintext: bool = setting(
        Flag(),
        False,
        "whether a stream without TLS may leave this host, or be waited for where others can connect: whoever is on "
        "the way reads the guest's memory then, and can write it",
    )
    unfinished_tls: bool = setting(
        Flag(),
        False,
        "whether a source over TLS may hang up without saying that it does (close_notify), as a QEMU before 10.0 does: "
        "whoever can cut the link may have done it then",
    )
