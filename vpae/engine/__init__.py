"""One loop for every method, one process or many."""
