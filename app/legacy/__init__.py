"""Addresses of the service before this one, which people have in their bookmarks."""
