"""Training the embedded model, and measuring and exporting what came of it."""
