"""The bundled notifiers: plugins that are told what happens and change nothing. One module each."""
