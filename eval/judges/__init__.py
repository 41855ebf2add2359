"""One file a judge: how to ask it, how to read its answer."""
