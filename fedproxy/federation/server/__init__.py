"""The round loop and what it keeps; it knows nothing of the clients but the protocol."""
