"""How lanes encode pages: a method of QEMU's, or a codec that both ends have agreed on by its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Self

import attrs

from whimbrel.abc import Codec, CodecSpec
from whimbrel.errors import ConfigError, IncompatibleError, UnknownNameError
from whimbrel.plugins import PluginManager
from whimbrel.settings import Limits, Parameters
from whimbrel.wire import multifd
from whimbrel.wire.form import Form

NONE: Final = "none"
CAPABILITY: Final = "multifd-compression="  # and the name, in the list of the configuration section


@attrs.frozen
class Method:
    """What `multifd-compression` names; `spec` is None for none.

    `parameters` are those of the migration's start, with the limits of whoever is to decode.
    """

    name: str = NONE
    spec: CodecSpec | None = None
    parameters: Mapping[str, object] = attrs.field(factory=dict)

    @classmethod
    def of(cls, parameters: Parameters, plugins: PluginManager, limits: Limits | None = None) -> Self:
        """What these parameters name, within `limits`.

        Raises ConfigError for what no lane can use, and for what there is not.
        """
        name = parameters.multifd_compression
        spec = check_method(name, plugins)
        within = {} if limits is None else limits.as_dict()
        return cls() if spec is None else cls(name, spec, {**parameters.as_dict(), **within})

    @property
    def bits(self) -> int:
        """What its packets have in their flags."""
        return multifd.method_bits(self.name)

    @property
    def announced(self) -> str:
        """What the stream's configuration must say, for a method that no QEMU has; "" for QEMU's own."""
        return "" if self.name in multifd.METHODS else CAPABILITY + self.name

    def announced_in(self, form: Form) -> Form:
        """`form` with what its configuration must say. A form without one stays as it is, and is refused."""
        configuration = form.configuration
        if not self.announced or configuration is None:
            return form
        capabilities = (*configuration.capabilities, self.announced)
        return attrs.evolve(form, configuration=attrs.evolve(configuration, capabilities=capabilities))

    def new_codec(self) -> Codec | None:
        """The codec of one lane; None where pages go as they are."""
        if self.spec is None:
            return None
        assert self.spec.create_for_lane is not None, "a codec that lanes cannot use was not refused"
        return self.spec.create_for_lane(self.parameters)


def check_method(name: str, plugins: PluginManager) -> CodecSpec | None:
    """The codec that `multifd-compression` names, None for none. Raises ConfigError for what no lane can use."""
    if name == NONE:
        return None
    try:
        spec = plugins.codec(name)
    except UnknownNameError as exc:
        raise _refused(name, f"{exc.message}; {exc.hint}") from exc
    if spec.create_for_lane is None:
        raise _refused(name, "that codec has nothing for lanes")
    return spec


def check_announced(capabilities: Sequence[str], ours: Method | None) -> tuple[str, ...]:
    """The capabilities in a configuration that say nothing of lanes.

    Raises IncompatibleError if those that do are not what lanes are to encode with here.
    """
    theirs = [name.removeprefix(CAPABILITY) for name in capabilities if name.startswith(CAPABILITY)]
    wanted = [ours.name] if ours is not None and ours.announced else []
    if theirs != wanted:
        here = "is off here" if ours is None else f"is {ours.name!r} here"
        there = f"sends with multifd-compression {theirs[0]!r}" if theirs else "names no codec for lanes"
        raise IncompatibleError(
            f"the source {there}, and it {here}", hint="multifd-compression must be the same at both ends"
        )
    return tuple(name for name in capabilities if not name.startswith(CAPABILITY))


def _refused(name: str, hint: str) -> ConfigError:
    return ConfigError(f"Parameter 'multifd-compression' does not accept value '{name}'", hint=hint)
