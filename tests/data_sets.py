"""Data sets of a function, for tests of what reads them."""

from torch.utils.data import Dataset


class Listed(Dataset):
    """A data set of pairs; ``get`` takes an index."""

    def __init__(self, get, count):
        self.get, self.count = get, count

    def __getitem__(self, row):
        return self.get(row)

    def __len__(self):
        return self.count
