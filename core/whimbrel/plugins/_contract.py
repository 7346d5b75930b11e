"""What a plugin must look like to be registered; says what is wrong with one that does not.

pluggy checks the names of parameters. What it lets pass in silence, and what fails only when the hook is called, is
refused here: a hook that nobody calls, a function that forgot its decorator, a coroutine taken for a result.
"""

from __future__ import annotations

import inspect
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Final

from whimbrel import hookspecs

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import pluggy

__all__ = ["HOOKS", "find_fault"]

HOOKS: Final[Mapping[str, tuple[str, ...]]] = {
    name: tuple(inspect.signature(getattr(hookspecs, name)).parameters)
    for name in sorted(hookspecs.OFFERS | hookspecs.CHECKS | hookspecs.CHOICES | hookspecs.NOTICES)
}
"""Every hook and the names of its parameters."""

_PREFIX: Final = f"{hookspecs.PROJECT}_"


def find_fault(plugin: object, manager: pluggy.PluginManager) -> str | None:
    """What is wrong with `plugin`, as one sentence, or None. Runs no code of the plugin's."""
    if inspect.isclass(plugin):
        return f"{plugin.__name__} is a class; offer an instance of it, or a module"
    implemented: set[str] = set()
    for name in dir(plugin):
        options = manager.parse_hookimpl_opts(plugin, name)
        if options is None:
            fault = _undecorated(plugin, name)
        else:
            hook = options.get("specname") or name
            fault = _misfit(hook, getattr(plugin, name), dict(options))
            if hook in implemented:
                fault = f"it implements {hook} twice"
            implemented.add(hook)
        if fault is not None:
            return fault
    return None


def _undecorated(plugin: object, name: str) -> str | None:
    if not name.startswith(_PREFIX):
        return None
    static = inspect.getattr_static(plugin, name, None)
    if inspect.ismodule(static) or inspect.isclass(static) or not (callable(static) or name in HOOKS):
        return None  # an import or a constant that happens to be called so
    if name not in HOOKS:
        return f"{_unknown(name)} (and it lacks the decorator @whimbrel.hookimpl)"
    return f"{name} is not a function with the decorator @whimbrel.hookimpl"


def _misfit(hook: str, function: Callable[..., Any], options: Mapping[str, Any]) -> str | None:
    if hook not in HOOKS:
        # This is how a plugin for a newer whimbrel marks a hook that an older one may lack.
        return None if options.get("optionalhook") else _unknown(hook)
    if options.get("wrapper") or options.get("hookwrapper"):
        return f"{hook} is a wrapper; every implementation is called by itself, so there is nothing to wrap"
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        return f"{hook} is async; hooks are plain functions"
    known = HOOKS[hook]
    for parameter in inspect.signature(function).parameters.values():
        what = f"{hook} has the parameter {parameter.name!r}, which"
        if parameter.kind in {parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD}:
            return f"{what} collects arguments; name those you want: {', '.join(known) or 'there are none'}"
        if parameter.kind is parameter.KEYWORD_ONLY:
            return f"{what} is keyword-only; arguments are passed by position"
        if parameter.default is not parameter.empty:
            return f"{what} has a default; it would never be used"
        if parameter.name not in known:
            return f"{what} the hook does not have; there are: {', '.join(known) or 'none'}"
    return None


def _unknown(name: str) -> str:
    close = get_close_matches(name, HOOKS, n=1)
    return f"there is no hook {name}; " + (f"did you mean {close[0]}?" if close else f"there are: {', '.join(HOOKS)}")
