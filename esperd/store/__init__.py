"""Durable truth: the one SQLite writer, content-addressed blobs, the file-system and clock seams."""
