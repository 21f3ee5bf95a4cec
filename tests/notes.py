"""What hooks and modules note in tests.

A step puts back the attributes of modules, and the lists and objects that their hooks reach. So a test that counts
passes in one of these would count none of the passes of an attack.
"""

from collections.abc import Sequence


class Notes(Sequence):
    """A list without attributes, which is no list to those who look for lists, so that nothing in it is put back."""

    __slots__ = ("_noted",)

    def __init__(self):
        self._noted = []

    def __getitem__(self, index):
        return self._noted[index]

    def __len__(self):
        return len(self._noted)

    def __eq__(self, other):
        return self._noted == list(other)

    __hash__ = None

    def __repr__(self):
        return repr(self._noted)

    def append(self, value):
        self._noted.append(value)

    def taken(self):
        """What was noted so far, as a list. From now on, what is noted is begun anew."""
        found, self._noted = self._noted, []
        return found
