"""Rows, copies and re-pointed triplets, as `Plan` has them."""

import matplotlib.pyplot as plt
import torch

from pml_adversarial.training.plan import plan_roles, plan_rows, replace_rows

TRIPLETS = torch.tensor([0, 1]), torch.tensor([1, 0]), torch.tensor([2, 2])  # anchors, positives, negatives
CLEAN, COPY, UNUSED = "#1f5fa8", "#c0392b", "0.8"

plans = {
    "no attack": replace_rows(torch.tensor([], dtype=torch.long), 3, TRIPLETS),
    'perturb="positive", copies appended': plan_roles(TRIPLETS, ["positive"], num_rows=3),
    'perturb="positive", rows replaced': plan_rows(TRIPLETS, ["positive"], num_rows=3),
    'perturb="all"': plan_rows(TRIPLETS, ["anchor", "positive", "negative"], num_rows=3),
}
figure, panels = plt.subplots(1, len(plans), figsize=(12, 3.1), layout="constrained")
for axes, (name, plan) in zip(panels, plans.items(), strict=True):
    evaluated = set(plan.pool_indices.tolist())

    def box(x, y, index, size=0.62, evaluated=evaluated, axes=axes):
        colour = (CLEAN if index < 3 else COPY) if index in evaluated else UNUSED
        axes.add_patch(plt.Rectangle((x - size / 2, y - size / 2), size, size, facecolor=colour, edgecolor="none"))
        axes.text(x, y, str(index), color="white", ha="center", va="center", fontsize=11)

    for row in range(3):
        box(row, 3.1, row)
    for copy, row in enumerate(plan.rows.tolist()):
        box(row, 2.0, 3 + copy)
        axes.annotate("", (row, 2.34), (row, 2.76), arrowprops={"arrowstyle": "->", "color": "0.4"})
    for number, members in enumerate(zip(*plan.indices_tuple, strict=True)):
        for place, member in enumerate(members):
            box(place, 0.85 - 0.75 * number, int(plan.pool_indices[member]))
    for place, role in enumerate(("anchor", "positive", "negative")):
        axes.text(place, 1.32, role, ha="center", fontsize=8, color="0.3")
    axes.set_title(name, fontsize=10)
    axes.set(xlim=(-1.3, 2.6), ylim=(-0.4, 3.6), aspect="equal")
    axes.set_axis_off()
for y, what in ((3.1, "rows"), (2.0, "copies"), (0.85, "triplets")):
    panels[0].text(-0.55, y, what, ha="right", va="center", fontsize=9, color="0.3")
