"""Real sites: what a data owner runs, what carries messages between it and the server, and what both start."""
