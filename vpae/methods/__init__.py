"""The algorithms: one file each, all with the small surface of :class:`vpae.methods.base.Method`."""
