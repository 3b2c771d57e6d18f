"""Photos: upload, pictures, likes and comments."""
