"""Many edits from one file: what is asked for, in which groups it is made, and what comes of it."""
