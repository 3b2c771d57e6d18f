"""What happened to a person: kept as a list, and told to who is listening."""
