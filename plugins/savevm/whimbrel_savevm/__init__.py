"""The bundled savevm handlers: `ram`, `block` and `devices`."""
