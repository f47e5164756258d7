"""Key-value caches that are smaller: thin keys (ThinK), and what attends to them."""
