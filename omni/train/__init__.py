"""Training: one loop, one kind of checkpoint and one log for the transformer and for the tokenizers."""
