"""Shared fixtures: small random models and rows."""
