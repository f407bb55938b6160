"""One file per benchmark: each is a function that measures and returns what it would print as JSON."""
