"""Published ways to train robust embeddings, one module each, as plugins.

``AdversarialLoss(loss, model, plugins=["hm", "ics"])``, or with options as values,
``plugins=[HM(destination="semihard"), ICS(weight=0.5)]``. Each answers only the questions in which it differs from the
package's own method, and leaves the attack and its budget to the caller.
"""

from .act import ACT
from .amd import AMD, RAMD
from .atta import ATTA
from .awp import AWP
from .est import EST
from .fare import FARE
from .free_at import FreeAT
from .hard_rows import HardRows
from .hm import HM
from .ics import ICS
from .ses import SES
from .trades import TRADES
from .tride import TRIDE

__all__ = [
    "ACT",
    "AMD",
    "ATTA",
    "AWP",
    "EST",
    "FARE",
    "HM",
    "ICS",
    "RAMD",
    "SES",
    "TRADES",
    "TRIDE",
    "FreeAT",
    "HardRows",
]
