"""Records in, text out: what the terminal shows. Nothing here loads torch or runs a model."""
