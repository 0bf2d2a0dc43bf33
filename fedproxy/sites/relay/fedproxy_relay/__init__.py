"""The two ends of a courier: a socket of the server's run, and a socket of each site."""
