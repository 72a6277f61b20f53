"""Every method on the same generated or real images, one edit at a time."""
