"""Hashtags and mentions: found in what people write, and the pages of tags."""
