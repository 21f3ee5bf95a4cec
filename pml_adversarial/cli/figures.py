"""Pictures of the demo: R@1 against eps, and the items that attacked queries find."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from ..evaluation import Gallery
from ..evaluation.retrieval.embedder import embed_all

_RIGHT, _WRONG, _QUERY = "#1b7f4d", "#c0392b", "#444444"
_COLOURS = ("#7f7f7f", "#1f5fa8")
_NEIGHBOURS = 5  # items shown per query


def recall_curves(curves: Mapping[str, Mapping[float, float]], chance: float, path: Path) -> None:
    """Draws R@1 in [0, 1] against eps (0: clean), one curve per model."""
    figure = Figure(figsize=(6, 4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for colour, (name, curve) in zip(_COLOURS, curves.items(), strict=False):
        axes.plot(list(curve), list(curve.values()), "o-", color=colour, label=name)
    axes.axhline(chance, color="black", linestyle=":", linewidth=1, label="chance")
    axes.set(xlabel="eps (l-inf, pixels in [0, 1])", ylabel="R@1, worst case per query", ylim=(0, 1.02))
    axes.set_title("Unseen classes, attacked queries, clean gallery")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def query_panel(
    models: Mapping[str, tuple[nn.Module, Tensor]],
    images: Tensor,
    labels: Tensor,
    queries: Sequence[int],
    eps: float,
    path: Path,
) -> None:
    """Draws queries, clean and perturbed, with the nearest items that they find.

    Args:
        models: name -> the model, and the attacked queries ``(Q, C, H, W)``, one per image.
        images: ``(Q, C, H, W)``, the clean queries, which are the gallery too.
        labels: ``(Q,)``.
        queries: rows to show.
        eps: of the attack, for the title.
        path: PNG to write.
    """
    width = _NEIGHBOURS + 1
    figure = Figure(figsize=(2 * width + 1.2, 1.15 * len(queries) * len(models) + 1.2), dpi=110)
    grid = figure.subplots(len(queries) * len(models), 2 * width, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for m, (name, (model, attacked)) in enumerate(models.items()):
        gallery = Gallery(embed_all(model, images, 512), labels)
        for q, query in enumerate(queries):
            row = grid[q * len(models) + m]
            targets = gallery.leave_one_out(torch.tensor([query], device=images.device))
            for half, image in enumerate((images[query], attacked[query])):
                with torch.no_grad():
                    found = gallery.nearest(model(image.unsqueeze(0)), targets, _NEIGHBOURS)[0].tolist()
                first, *cells = row[half * width : (half + 1) * width]
                _show(first, image, _QUERY, f"{name}\n{('clean', 'attacked')[half]}: {int(labels[query])}")
                for cell, item in zip(cells, [item for item in found if item >= 0], strict=False):
                    colour = _RIGHT if labels[item] == labels[query] else _WRONG
                    _show(cell, images[item], colour, str(int(labels[item])))
    figure.suptitle(
        f"Queries of unseen classes and their nearest items, clean (left) and attacked at eps {eps:g} (right).\n"
        "Green: right class. Red: wrong class."
    )
    figure.subplots_adjust(
        top=1 - 0.9 / figure.get_figheight(), bottom=0.02, left=0.03, right=0.99, hspace=0.55, wspace=0.12
    )
    figure.savefig(path)


def _show(axes: Axes, image: Tensor, colour: str, title: str) -> None:
    axes.set_axis_on()
    pixels = image.detach().permute(1, 2, 0).squeeze(2).cpu().numpy()
    axes.imshow(pixels, cmap="gray_r", vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=6.5, color=colour, pad=2)
    for spine in axes.spines.values():
        spine.set(color=colour, linewidth=2)
