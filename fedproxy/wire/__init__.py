"""What crosses the line between the server and the sites, and what carries it."""
