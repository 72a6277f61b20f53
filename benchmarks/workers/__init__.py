"""Work shared out over processes that may hang or die: compiling, and launching what was never launched before."""
