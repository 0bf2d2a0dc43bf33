"""A site: its rows, its memory, its model; it knows nothing of the server but the protocol."""
