"""Accounts: sign-up, log-in, sessions and profiles."""
