"""FX passes of the backend."""
