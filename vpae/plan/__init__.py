"""Know before you pay: what a recipe needs on given hardware, found by taking its turns without weights or a GPU."""
