"""What a person calls: the `fpe` command and what it says."""
