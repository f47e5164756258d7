"""Thinner key-value caches: which channels to keep, attention over them, their files and their bytes. Pure torch."""
