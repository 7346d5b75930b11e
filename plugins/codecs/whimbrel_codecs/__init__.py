"""The bundled codecs: one module each, found through entry points.

There are none yet; xbzrle, zlib and zstd will be here.
"""
