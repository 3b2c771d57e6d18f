"""A demo: a few hundred people with generated photos, follows, likes and comments."""
