"""Random triplets and pairs of every kind, over a few rows."""

import random

import torch

N = 9
KINDS = ["triplets", "pairs", "no triplets", "no pairs", "no positive pairs"]


def random_tuples(kind, rows=N, seed=0):
    draw = random.Random(seed)

    def members(how_many, count):
        drawn = [draw.choices(range(rows), k=count) for _ in range(how_many)]
        return tuple(torch.tensor(member, dtype=torch.long) for member in drawn)

    return {
        "triplets": lambda: members(3, 40),
        "pairs": lambda: (*members(2, 25), *members(2, 31)),
        "no triplets": lambda: members(3, 0),
        "no pairs": lambda: members(4, 0),
        "no positive pairs": lambda: (*members(2, 0), *members(2, 12)),
    }[kind]()
