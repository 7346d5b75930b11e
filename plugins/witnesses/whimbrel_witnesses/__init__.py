"""The bundled witnesses: places where the first of two writers wins. One module each."""
