"""The trainers, one a method, and what they are made of: policy and batches in, gradients and metrics out."""
