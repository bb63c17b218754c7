"""The order in which samples are seen: a pure function of (seed, position)."""

from __future__ import annotations

import numpy as np

from vpae.draws import seed_of


class Stream:
    """An endless stream over ``length`` samples, shuffled anew each epoch.

    Position p is sample ``p % length`` of epoch ``p // length``; a run is resumed by going on at the next position.
    """

    def __init__(self, length: int, seed: int) -> None:
        if length < 1:
            raise ValueError("a stream needs at least one sample")
        self.length, self.seed = length, seed
        self._epoch, self._order = -1, np.empty(0, int)

    def index(self, position: int) -> int:
        """The sample at ``position``."""
        epoch, place = divmod(position, self.length)
        if epoch != self._epoch:
            generator = np.random.Generator(np.random.PCG64(seed_of(self.seed, "order", epoch)))
            self._epoch, self._order = epoch, generator.permutation(self.length)
        return int(self._order[place])
