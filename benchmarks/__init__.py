"""Measurements: ratios of two sides in one run, in turns; nothing here is a timed test."""
