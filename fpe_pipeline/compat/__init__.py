"""Other tools' surfaces: their names and arguments, on current diffusers and without stored attention maps."""
