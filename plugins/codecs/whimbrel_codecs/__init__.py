"""The bundled codecs: one module each, found through entry points."""
