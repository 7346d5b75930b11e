"""A machine finds the codecs by name: the bundled ones through their entry points, a stranger's like them."""

import pytest

from whimbrel.abc import Codec, CodecSpec, DeltaCodec
from whimbrel.errors import BrokenPlugin, UnknownNameError
from whimbrel.hookspecs import hookimpl
from whimbrel.machine import BareMachine
from whimbrel.migration import Machine
from whimbrel.plugins import PluginManager
from whimbrel_codecs import xbzrle, zlib


@pytest.mark.parametrize(("name", "module", "kind"), [("xbzrle", xbzrle, DeltaCodec), ("zlib", zlib, Codec)])
def test_the_bundled_ones_are_installed(name, module, kind):
    manager = PluginManager()
    (offered,) = module.whimbrel_codecs()
    spec = manager.codec(name)
    assert (spec.name, spec.summary) == (offered.name, offered.summary)
    assert isinstance(spec.create(), kind)
    assert name in [one.name for one in manager.codecs()]
    with Machine("m") as machine:
        one, other = machine.new_codec(name), machine.new_codec(name)
        assert isinstance(one, kind)
        assert one is not other, "each migration has its own"


def test_a_bare_machine_has_none():
    with BareMachine("m") as machine, pytest.raises(UnknownNameError, match="unknown codec 'xbzrle'; there are: none"):
        machine.new_codec("xbzrle")


def test_a_bare_machine_takes_those_it_is_given():
    specs = {spec.name: spec for spec in zlib.whimbrel_codecs()}
    with BareMachine("m", codec_spec=specs.__getitem__) as machine:
        assert isinstance(machine.new_codec("zlib"), zlib.ZlibCodec)


def test_a_name_that_nobody_offers():
    with Machine("m") as machine, pytest.raises(UnknownNameError, match=r"unknown codec 'zlob'; did you mean 'zlib'\?"):
        machine.new_codec("zlob")


def test_a_stranger_of_the_programs_own():
    class Own:
        @hookimpl
        def whimbrel_codecs(self):
            return [CodecSpec(name="own", summary="", create=zlib.ZlibCodec)]

    plugins = PluginManager()
    plugins.register(Own())
    with Machine("m", plugins=plugins) as machine:
        assert isinstance(machine.new_codec("own"), zlib.ZlibCodec)


def test_one_that_is_broken_says_so():
    class Broken:
        @hookimpl
        def whimbrel_codecs(self):
            raise ValueError("no compressor here")

    plugins = PluginManager(load_entry_points=False)
    plugins.register(Broken(), "zlib")
    with Machine("m", plugins=plugins) as machine, pytest.raises(BrokenPlugin, match="no compressor here"):
        machine.new_codec("zlib")
