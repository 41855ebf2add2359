"""One file a stage: policy folder in, policy folder out."""
