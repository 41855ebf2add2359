"""Answering prompts: transformers in batches, and TSDI."""
