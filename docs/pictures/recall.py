"""R@1 against eps, plain and adversarial training, from the committed runs of the benchmark.

It writes the pictures of the README and of the first page of the documentation, for light and for dark pages:

    python docs/pictures/recall.py
"""

import json
from pathlib import Path
from statistics import fmean

import matplotlib.pyplot as plt

RUNS = Path(__file__).parents[2] / "benchmarks" / "robustness" / "results"
PANELS = {  # title -> runs, and the method of the benchmark behind "AdversarialLoss"
    "Strokes: Omniglot 28x28, unseen alphabets": ("omniglot-1700k", "preset-ms"),
    "Photographs: Tiny ImageNet 32x32, unseen classes": ("tiny-imagenet-1700k", "preset-ms-two-steps"),
}
METHODS = {  # name in the picture -> method of the benchmark, colour on a light and on a dark page
    "plain": ("plain-supcon", "#6b7278", "#9aa5ad"),
    "HM & ICS as coded (CVPR 2022)": ("hm-lga-ics-as-coded", "#b0500e", "#e8a05f"),
    "AdversarialLoss": (None, "#1c5d8c", "#7db8e8"),
}


def curves(experiment, ours):
    """Name -> {eps in 255ths: R@1 in percent in the worst case, mean over seeds}."""
    found = {}
    for name, (method, *_) in METHODS.items():
        method = method or ours
        reports = [json.loads(p.read_text())["report"] for p in sorted(RUNS.glob(f"{experiment}/{method}/*/run.json"))]
        by_seed = [
            {0: r["clean"]["recall_at_1"], **{round(255 * w["eps"]): w["measures"]["recall_at_1"] for w in r["worst"]}}
            for r in reports
        ]
        found[name] = {eps: 100 * fmean(seed[eps] for seed in by_seed) for eps in by_seed[0]}
    return found


def draw(dark=False):
    """One panel for each data set."""
    ink, page = ("#e3e6e8", "#0d1117") if dark else ("#1f2529", "white")
    style = {"text.color": ink, "axes.labelcolor": ink, "xtick.color": ink, "ytick.color": ink, "font.size": 11}
    with plt.rc_context({**style, "svg.hashsalt": "recall", "axes.edgecolor": ink, "figure.facecolor": page}):
        size = 6.4 * len(PANELS), 3.6
        figure, row = plt.subplots(1, len(PANELS), figsize=size, squeeze=False, layout="constrained")
        for axes, (title, panel) in zip(row[0], PANELS.items(), strict=True):
            axes.set_facecolor(page)
            for (name, values), (_, light, on_dark) in zip(curves(*panel).items(), METHODS.values(), strict=True):
                shown = {eps: value for eps, value in values.items() if eps <= 26}
                axes.plot(list(shown), list(shown.values()), "o-", lw=2.4, color=on_dark if dark else light, label=name)
            axes.set(title=title, xlabel="eps", ylabel="R@1 in percent, worst case", ylim=(0, None))
            axes.set_xticks(list(shown), [f"{eps}/255" if eps else "no attack" for eps in shown])
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", alpha=0.25)
            axes.legend(frameon=False, labelcolor=ink)
    return figure


if __name__ == "__main__":
    about = json.dumps({title: curves(*panel) for title, panel in PANELS.items()})
    for name, dark in (("light", False), ("dark", True)):
        path = Path(__file__).with_name(f"recall_{name}.svg")
        draw(dark).savefig(path, metadata={"Date": None, "Description": about})
