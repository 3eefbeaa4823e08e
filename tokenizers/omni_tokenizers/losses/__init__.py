"""What tokenizers are trained by: how far a reconstruction is from what it should be."""
