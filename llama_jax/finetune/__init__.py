"""A chat model of a base model: the paper's second half (sections 3 and 4)."""
