"""Ranking: small pure stages, from many candidates to the order in which a window is shown."""
