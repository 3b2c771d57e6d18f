"""Finding people and hashtags by what somebody remembers of them."""
