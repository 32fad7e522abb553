"""Figures of the documents: every one is written here from a row, or checked against it."""
