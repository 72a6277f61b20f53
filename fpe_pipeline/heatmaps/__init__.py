"""Where words of a prompt act in a picture, read in a run."""
