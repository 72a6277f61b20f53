"""From a real image to the noise that it comes out of again."""
