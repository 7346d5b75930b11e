"""The bundled savevm handlers: `ram` and `devices`."""
