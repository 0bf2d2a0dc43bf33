"""Accounting, noise, ledgers and releases, DP-SGD, and sums that hide what each client sent."""
