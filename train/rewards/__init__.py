"""Verifiable rewards: plain functions of a completion and its task, in the form that TRL's GRPOTrainer calls."""
