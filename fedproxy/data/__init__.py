"""Rows, and what becomes of them: sources, formats, tokens, batches, and who owns which."""
