"""One file a suite: which prompts, which score."""
