"""Other tools' surfaces, under the names and with the arguments that their users write: one import changes."""
