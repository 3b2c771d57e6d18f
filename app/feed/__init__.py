"""The home feed and what is new everywhere."""
