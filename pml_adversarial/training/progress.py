"""What training shows while it runs: one line of the log in so many steps."""

from __future__ import annotations

import logging
import math

from ..attacks.ball import radius_text
from ..attacks.checks import check_whole
from . import distributed
from .records import LossRecords

logger = logging.getLogger("pml_adversarial")


class ProgressLog:
    """Logs the records of one in ``every`` steps, at level INFO; of several processes, the first alone does.

    Where the program shows no such lines, because it has not set up `logging`, they are written to stderr.

    Args:
        every: a number of steps.

    Raises:
        InputError: ``every`` is no whole number from 1 on.
    """

    def __init__(self, every: int) -> None:
        self.every = check_whole("log_every", every, hint=", as the number of steps from one line to the next")

    def __call__(self, steps: int, records: LossRecords) -> None:
        """Logs the records of step number ``steps``, counted from 1, if it is its turn."""
        if steps % self.every or distributed.rank():
            return
        if not logger.isEnabledFor(logging.INFO):
            logger.setLevel(logging.INFO)
        if not logger.hasHandlers():
            logger.addHandler(logging.StreamHandler())
        logger.info(line(steps, records))


def line(steps: int, records: LossRecords) -> str:
    """The records of a step as one line; what was not measured yet is left out.

    >>> found = LossRecords(0.5, 8, 4 / 255, loss_before=0.41234, loss_after=0.63, batch_recall=0.8)
    >>> line(100, found)
    'step 100: loss 0.4123 clean, 0.63 attacked; eps at 50 %, changes up to 4/255; R@1 in the batch 80 % clean'
    """
    losses = f"loss {records.loss_before:.4g} clean, {records.loss_after:.4g} attacked"
    attack = f"eps at {100 * records.strength:.0f} %"
    if not math.isnan(records.perturbation_linf):
        attack += f", changes up to {radius_text(records.perturbation_linf)}"
    recalls = [
        f"{100 * value:.0f} % {name}"
        for value, name in ((records.batch_recall, "clean"), (records.batch_recall_attacked, "attacked"))
        if not math.isnan(value)
    ]
    parts = [losses if records.num_perturbed else "nothing was perturbed", attack]
    parts += [f"R@1 in the batch {', '.join(recalls)}"] * bool(recalls)
    return f"step {steps}: {'; '.join(parts)}"
