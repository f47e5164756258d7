"""Adapters to foreign frameworks: one framework per file, each undone as cleanly as it is applied."""
