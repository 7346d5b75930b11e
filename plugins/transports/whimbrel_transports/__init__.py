"""The bundled transports: one module for each scheme of a migration URI, found through entry points."""
