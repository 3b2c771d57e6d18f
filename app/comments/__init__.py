"""Comments under photos, and the answers to them."""
