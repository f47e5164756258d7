"""Optimizers: update rules as pure functions on tensors, and the codecs their state is kept in."""
