"""Everything with I/O: the processes that people start, and the world outside."""
