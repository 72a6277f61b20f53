"""A run of the command line: its settings, its images and the record by which it repeats."""
