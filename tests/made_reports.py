"""Reports made by hand, with numbers that can be told apart."""

from dataclasses import replace

import torch

from pml_adversarial.evaluation.reports.report import Report
from pml_adversarial.evaluation.reports.results import AttackResult, Check, Example, Neighbour, WorstCase

EPS = (4 / 255, 0.1, 26 / 255)


def share(i):
    """Numbers of which no two look alike when rounded to a tenth of a percent."""
    return ((i * 389 + 17) % 997) / 997


def measures(i):
    return {"recall_at_1": share(i), "recall_at_8": share(i + 1), "map_at_r": share(i + 2), "r_precision": share(i + 3)}


def neighbours(seed, labels, shape=(1, 8, 8)):
    pixels = torch.rand(len(labels), *shape, generator=torch.Generator().manual_seed(seed))
    return tuple(Neighbour(100 + seed + i, label, pixels[i], label == 7) for i, label in enumerate(labels))


def example(query=3, shape=(1, 8, 8), eps=0.1, **changes):
    generator = torch.Generator().manual_seed(query)
    clean = torch.rand(*shape, generator=generator) * 0.6 + 0.2
    perturbed = clean + eps * torch.randint(-1, 2, shape, generator=generator)
    parts = {"query": query, "label": 7, "eps": eps, "attack": "margin", "clean": clean, "perturbed": perturbed}
    found = {"before": neighbours(1, (7, 7, 2), shape), "after": neighbours(9, (9, 7, 5), shape)}
    return Example(**{**parts, **found, **changes})


def report(attacks=(("margin", "query"), ("square", "query"), ("demote", "gallery")), eps=EPS, **changes):
    results = [
        AttackResult(
            name,
            target,
            name == "square",
            radius,
            measures(20 * e + 5 * a),
            0.1234 + e + a / 10,
            10**6 + e,
            a,
            2.5,
            "1",
        )
        for e, radius in enumerate(eps)
        for a, (name, target) in enumerate(attacks)
    ]
    worst = [
        WorstCase(target, radius, measures(200 + 20 * e + 5 * t), "0", share(400 + e) if target == "query" else None)
        for t, target in enumerate(("query", "gallery"))
        if target in dict(attacks).values()
        for e, radius in enumerate(eps)
    ]
    parts = {
        "suite": "standard-v1",
        "protocol": "leave-one-out",
        "num_queries": 12345,
        "num_gallery": 23456,
        "num_classes": 17,
        "left_out": 41,
        "clean": measures(300),
        "chance": share(310),
        "attacks": tuple(results),
        "worst": tuple(worst),
        "collapse": {"mean_similarity": 0.4321, "effective_rank": 12.3456},
        "nmi": share(320),
        "checks": (
            Check("more steps", True, "0 of 128"),
            Check("black box", None, "not run"),
            Check("noise", True, "none"),
        ),
        "settings": {"norm": "Linf", "eps": list(eps), "subset": list(range(50)), "normalization": None},
        "versions": {"torch": "2.14.1"},
        "provenance": {
            "model": {"class": "Net", "sha256": "ab12" * 16},
            "queries": {"images": 12386, "hashed": 1024, "sha256": "cd34" * 16},
            "gallery": "the queries",
            "autocast": None,
            "cudnn_benchmark": True,
            "command": ["python", "-m", "a b"],
        },
        "clean_flags": "1",
        "examples": (example(), example(5, (3, 8, 8))),
    }
    return Report(**{**parts, **changes})


def as_measured(made):
    """The same with numbers that agree, as in a report that an evaluation wrote: only such a one is read again."""

    def agreeing(part):
        right = round(part.measures["recall_at_1"] * made.num_queries)
        flags = "1" * right + "0" * (made.num_queries - right)
        return replace(part, measures={**part.measures, "recall_at_1": right / made.num_queries}, robust_flags=flags)

    right = round(made.clean["recall_at_1"] * made.num_queries)
    names = list(dict.fromkeys(one.attack for one in made.attacks))
    attacks = {"attacks": names, "attack_settings": [{"name": name} for name in names]}
    others = {"distance": "cosine", "batch_size": 128, "device": "cpu"}
    return replace(
        made,
        clean={**made.clean, "recall_at_1": right / made.num_queries},
        clean_flags="1" * right + "0" * (made.num_queries - right),
        attacks=tuple(agreeing(one) for one in made.attacks),
        worst=tuple(agreeing(one) for one in made.worst),
        settings={**made.settings, **attacks, **others},
        provenance={**made.provenance, "threads": 1, "gallery": {"is_the_queries": True, "sha256": "ef56" * 16}},
    )
