"""The page: what a browser asks for, what is run for it, and what it is shown."""
