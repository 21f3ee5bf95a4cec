"""Retrieval in plain python, one query and one item at a time: what the evaluation is held against."""

import math

TIE = 1e-6


def cosine(a, b):
    a, b = [float(x) for x in a], [float(x) for x in b]
    lengths = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / lengths


def similarities(query, own, embeddings):
    """Item -> its similarity to the query, the own item left out."""
    return {j: cosine(query, embeddings[j]) for j in range(len(embeddings)) if j != own}


def margin(query, label, own, embeddings, labels):
    found = similarities(query, own, embeddings)
    wrong = max(value for j, value in found.items() if int(labels[j]) != int(label))
    right = max(value for j, value in found.items() if int(labels[j]) == int(label))
    return wrong - right


def stands(query, label, own, embeddings, labels):
    return margin(query, label, own, embeddings, labels) < -TIE


def ranked(query, label, own, embeddings, labels):
    """Whether each item is right, nearest first; of items as near as one another, wrong ones first."""
    found = similarities(query, own, embeddings)
    right = [j for j in found if int(labels[j]) == int(label)]
    order = sorted(right, key=lambda j: -found[j])
    wrong = sorted(set(found) - set(right), key=lambda j: -found[j])
    listed = []
    for j in order:
        while wrong and found[wrong[0]] >= found[j] - TIE:
            listed.append(False)
            wrong.pop(0)
        listed.append(True)
    return listed + [False] * len(wrong)


def measures(query, label, own, embeddings, labels, recall_at):
    listed = ranked(query, label, own, embeddings, labels)
    total = sum(listed)
    found = {f"recall_at_{k}": float(any(listed[:k])) for k in recall_at}
    precisions = [sum(listed[: i + 1]) / (i + 1) for i in range(total) if listed[i]]
    found["map_at_r"] = sum(precisions) / max(total, 1)
    found["r_precision"] = sum(listed[:total]) / max(total, 1)
    return found
