"""The round loop, the clients, and what runs them."""
