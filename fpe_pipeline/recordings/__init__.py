"""A source generated once, kept, and edited any number of times."""
