"""The parts of `shardkit doctor`: what is collected, and one pure function for each check."""
