"""The methods that are compared: what each wraps, perturbs and mines. The budget of their attacks is the protocol's.

Each is one entry of `METHODS`; a method of your own is one more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from types import FunctionType
from typing import Any

from pytorch_metric_learning.losses import (
    MultipleLosses,
    MultiSimilarityLoss,
    NormalizedSoftmaxLoss,
    SupConLoss,
    TripletMarginLoss,
)
from pytorch_metric_learning.miners import DistanceWeightedMiner
from pytorch_metric_learning.reducers import MeanReducer
from torch import nn

from pml_adversarial import AdversarialLoss, InputError, attacks
from pml_adversarial.attacks import NFGSM, FriendlyPGD
from pml_adversarial.attacks.autocast import Autocast
from pml_adversarial.defenses.atta import ATTA
from pml_adversarial.defenses.free_at import FreeAT
from pml_adversarial.defenses.hard_rows import HardRows
from pml_adversarial.evaluation.attacks.as_json import description

from . import miners
from .data import PHOTOGRAPHS
from .protocol import Protocol

Miner = Callable[..., Any]
"""``(embeddings, labels)`` -> tuples; one of PML's fits."""

_METHOD_ALONE = {"guard": False}
"""Of `AdversarialLoss`, for published methods, which plan by themselves: nothing of the package's own is added."""


@dataclass(frozen=True)
class Method:
    """How one method trains.

    Attributes:
        said: what it is, in a few words.
        loss: makes the loss that is wrapped; with `proxies`, from the number of classes and of dimensions.
        miner: makes what chooses tuples; None: the loss does.
        plugins: makes the plugins by protocol, at the moment that they are needed.
        options: of `AdversarialLoss`, by protocol; None: the loss is not wrapped.
        warmup: share of the training over which the attack grows; None: as long as the package grows it by default.
        twice: whether it takes twice the protocol's steps, as training without an attack does.
        replays: how many steps each batch is taken for.
        original: whether the network at the start stands for a deployed one: the loss gets its embeddings as
            references, and the gallery of the evaluation keeps them unless it is embedded anew.
        trains: whether there are steps at all.
        proxies: whether the loss has weights of its own, for each training class.
    """

    said: str
    loss: Callable[..., nn.Module]
    miner: Callable[[], Miner] | None = None
    plugins: Callable[[Protocol], list[Any]] = lambda protocol: []
    options: Callable[[Protocol], dict[str, Any]] | None = None
    warmup: float | None = 0.0
    twice: bool = False
    replays: int = 1
    original: bool = False
    trains: bool = True
    proxies: bool = False

    def steps(self, protocol: Protocol) -> int:
        """Of the optimiser; 0 where a budget decides."""
        return protocol.steps * (2 if self.twice else 1)

    @property
    def needs_start(self) -> bool:
        """Whether it begins with a trained network."""
        return self.original or not self.trains

    def check(self, protocol: Protocol) -> None:
        """Refuses a protocol that the method cannot be trained with.

        Raises:
            InputError: there is no trained network to begin with, or it would not be trained and has other activations,
                or images without labels do not suit the method.
        """
        if self.needs_start and not protocol.pretrained:
            raise InputError(f"{self.said}: begins with a trained network; give its weights with --pretrained FILE.")
        if self.needs_start and protocol.head:
            raise InputError(f"{self.said}: begins with a trained network, and a --head is not trained. Leave it out.")
        if protocol.smooth and not self.trains:
            raise InputError(f"{self.said}: is not trained, and other activations would break it. Leave out --smooth.")
        if protocol.mixed and self._uses_labels(protocol):
            raise InputError(f"{self.said}: uses labels, and blended images have none. Leave out --mixed.")

    def recipe(self, protocol: Protocol) -> dict[str, Any]:
        """Loss, miner, plugins and options in JSON's types: whoever changes one of them trains anew."""
        options = None if self.options is None else self.options(protocol)
        return {
            "loss": _told(self._loss(2, 2)),
            "miner": None if self.miner is None else _told(self.miner()),
            "plugins": [_told(plugin) for plugin in self.plugins(protocol)],
            "options": options and {name: description(value) for name, value in options.items()},
            "warmup": self.warmup,
            "steps": self.steps(protocol),
            **({"replays": self.replays} if self.replays > 1 else {}),
            **({"original": True} if self.original else {}),
            **({"trains": False} if not self.trains else {}),
        }

    def wrapped(
        self, protocol: Protocol, model: nn.Module, steps: int, seed: int, classes: int = 0, dimensions: int = 0
    ) -> nn.Module:
        """The loss to train with.

        Args:
            protocol: gives the attack's budget.
            model: what is trained.
            steps: how many there will be, for the warm-up; 0: full strength from the start.
            seed: of the attack.
            classes: of the training, for a loss with proxies.
            dimensions: of an embedding, likewise.
        """
        loss = self._loss(classes, dimensions)
        if self.options is None:
            return loss
        warmup = None if self.warmup is None and steps else int((self.warmup or 0.0) * steps)
        options = {"warmup": warmup, "seed": seed, **self.options(protocol)}
        return AdversarialLoss(loss, model, plugins=self.plugins(protocol), **options)

    def _uses_labels(self, protocol: Protocol) -> bool:
        return not self.original or any(plugin.loss_weight for plugin in self.plugins(protocol))

    def _loss(self, classes: int, dimensions: int) -> nn.Module:
        return self.loss(classes, dimensions) if self.proxies else self.loss()


def triplet() -> nn.Module:
    """``mean [d(a, p) - d(a, n) + 0.2]+`` over all triplets, satisfied ones too."""
    loss: nn.Module = TripletMarginLoss(margin=0.2, reducer=MeanReducer())
    return loss


def multi_similarity() -> nn.Module:
    """One of the losses that the preset is measured with; it cares most for negatives that are near."""
    loss: nn.Module = MultiSimilarityLoss(alpha=2, beta=40, base=0.5)
    return loss


def sup_con() -> nn.Module:
    """Another; it cares for all negatives."""
    loss: nn.Module = SupConLoss(temperature=0.1)
    return loss


def softmax(classes: int, dimensions: int) -> nn.Module:
    """Classification with a proxy for each training class (arXiv 1811.12649)."""
    loss: nn.Module = NormalizedSoftmaxLoss(classes, dimensions, temperature=0.05)
    return loss


def both() -> nn.Module:
    """The mean of the two."""
    loss: nn.Module = MultipleLosses([sup_con(), multi_similarity()], weights=[0.5, 0.5])
    return loss


def _defense(module: str, name: str, **options: Any) -> Any:
    try:
        found = getattr(import_module(f"pml_adversarial.defenses.{module}"), name)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"This version of pml_adversarial has no {name} in pml_adversarial.defenses.{module}."
        ) from error
    return found(**options)


def _told(part: Any) -> str:
    """The class of an object and the numbers, words and lists that it holds; of a function, its name."""
    if isinstance(part, list | nn.ModuleList):
        return f"[{', '.join(map(_told, part))}]"
    if isinstance(part, FunctionType) or not hasattr(part, "__dict__"):
        return description(part)
    held = {**vars(part), **vars(part).get("_modules", {})}
    said = [
        f"{name}={_told(value)}"
        for name, value in sorted(held.items())
        if name[0] != "_" and isinstance(value, str | int | float | list | nn.ModuleList)
    ]
    return f"{type(part).__name__}({', '.join(said)})"


def _always(miner: Miner) -> Callable[[], Miner]:
    """Of a miner that holds nothing, one serves all."""
    return lambda: miner


def _peers_attack(protocol: Protocol) -> dict[str, Any]:
    return {"attack": protocol.pgd(), **_METHOD_ALONE}


def _half_the_steps(protocol: Protocol) -> dict[str, Any]:
    return {"attack": protocol.pgd(steps=max(1, protocol.attack_steps // 2)), **_METHOD_ALONE}


def _seed_paper(protocol: Protocol) -> dict[str, Any]:
    eps = 0.01 if protocol.data in PHOTOGRAPHS else protocol.eps  # the paper's
    attack = protocol.pgd(eps=eps, alpha=2 * eps / 5, steps=5, random_start=True)
    return {"attack": attack, "perturb": "positive", "tuples_per_anchor": 1, "keep_clean": False, **_METHOD_ALONE}


def _preset(protocol: Protocol) -> dict[str, Any]:
    return {"attack": attacks.preset(protocol.preset_eps)}


def _with_steps(steps: int) -> Callable[[Protocol], dict[str, Any]]:
    return lambda protocol: {"attack": attacks.preset(protocol.preset_eps, steps)}


def _replaced(options: Callable[[Protocol], dict[str, Any]]) -> Callable[[Protocol], dict[str, Any]]:
    return lambda protocol: {**options(protocol), "keep_clean": False}


def _preset_without_its_attack(protocol: Protocol) -> dict[str, Any]:
    return {}


_RANDOM, _SOFT_HARD = _always(miners.random_negatives), _always(miners.soft_hard)


def _on_triplets(
    said: str, *plugins: tuple[Any, ...], miner: Callable[[], Miner] | None = _RANDOM, **more: Any
) -> Method:
    """A published defence: the triplet loss unless another is given, and plugins as (module, class, options)."""

    def made(protocol: Protocol) -> list[Any]:
        return [_defense(module, name, **(options[0] if options else {})) for module, name, *options in plugins]

    return Method(said, more.pop("loss", triplet), miner, made, **{"options": _peers_attack, **more})


def _saving(said: str, attack: Callable[[Protocol], Any]) -> Method:
    """The preset around both losses, with another attack."""
    return Method(said, both, options=lambda protocol: {"attack": attack(protocol)}, warmup=0.5)


def _beside_preset(said: str, *plugins: tuple[Any, ...]) -> Method:
    """The preset around MultiSimilarityLoss, with plugins."""
    return _on_triplets(said, *plugins, miner=None, loss=multi_similarity, options=_preset, warmup=0.5)


def _fare(said: str, **options: Any) -> Method:
    return replace(_beside_preset(said, ("fare", "FARE", options)), original=True)


def _fare_one_step(said: str, **options: Any) -> Method:
    return replace(_fare(said, **options), options=_with_steps(1))


_PRESET: dict[str, Any] = {"options": _preset, "warmup": 0.5}
_OWN_COPIES = {"raises": "hardness", "tuples_per_anchor": 1}
METHODS: dict[str, Method] = {
    "plain": Method("triplets, random negatives", triplet, _RANDOM, twice=True),
    "plain-softhard": Method("triplets, soft-hard negatives", triplet, _SOFT_HARD, twice=True),
    "plain-ms": Method("MultiSimilarityLoss", multi_similarity, twice=True),
    "plain-supcon": Method("SupConLoss", sup_con, twice=True),
    "plain-both": Method("mean of the two", both, twice=True),
    "plain-softmax": Method("NormalizedSoftmaxLoss", softmax, proxies=True, twice=True),
    "seed-paper": Method(
        "arXiv 2102.07265: positives of one tuple per anchor, 5 steps from a random start",
        lambda: TripletMarginLoss(margin=0.2),
        lambda: DistanceWeightedMiner(cutoff=0.5, nonzero_loss_cutoff=1.4),
        options=_seed_paper,
    ),
    "amd": _on_triplets("arXiv 1706.06083 on triplets: all members, as RobRank's code", ("amd", "AMD", _OWN_COPIES)),
    "ramd": _on_triplets("the same, anchors clean", ("amd", "RAMD", _OWN_COPIES)),
    "est": _on_triplets("arXiv 2002.11293: rows moved off themselves", ("est", "EST")),
    "ses": _on_triplets("the same as a penalty", ("ses", "SES")),
    "act": _on_triplets("arXiv 2106.03614: positives and negatives pulled together", ("act", "ACT")),
    "hm-lga": _on_triplets("arXiv 2203.01439: HM[S, LGA]", ("hm", "HM"), miner=_SOFT_HARD),
    "hm-lga-ics": _on_triplets("HM[S, LGA] & ICS", ("hm", "HM"), ("ics", "ICS"), miner=_SOFT_HARD),
    "hm-lga-ics-as-coded": _on_triplets(
        "the same; an anchor may be its own positive",
        ("hm", "HM"),
        ("ics", "ICS"),
        miner=_always(miners.soft_hard_as_coded),
    ),
    "tride": _on_triplets(
        "arXiv 2312.07364: CA-TRIDE", ("tride", "TRIDE"), miner=None, options=_half_the_steps, warmup=1.0
    ),
    "trades": _on_triplets("arXiv 1901.08573, on neighbours", ("trades", "TRADES")),
    "preset-ms": Method("AdversarialLoss(MultiSimilarityLoss(), model), eps grows", multi_similarity, **_PRESET),
    "preset-supcon": Method("AdversarialLoss(SupConLoss(), model), eps grows", sup_con, **_PRESET),
    "preset-both": Method("AdversarialLoss(mean of the two, model), eps grows", both, **_PRESET),
    "preset-softmax-one-step": Method(
        "NormalizedSoftmaxLoss with 1 step of 2.5 eps, perturbed rows alone",
        softmax,
        options=_replaced(_with_steps(1)),
        warmup=0.5,
        proxies=True,
    ),
    "preset-ms-one-step": Method(
        "preset-ms with 1 step of 2.5 eps", multi_similarity, options=_with_steps(1), warmup=0.5
    ),
    "preset-ms-two-steps": Method("preset-ms with 2 steps", multi_similarity, options=_with_steps(2), warmup=0.5),
    "preset-ms-replaced": Method(
        "preset-ms, perturbed rows alone", multi_similarity, options=_replaced(_preset), warmup=0.5
    ),
    "preset-ms-awp": _beside_preset("preset-ms with AWP, arXiv 2004.05884", ("awp", "AWP")),
    "trades-ms": _beside_preset("TRADES on neighbours, around MultiSimilarityLoss", ("trades", "TRADES")),
    "trades-ms-decoupled": _beside_preset(
        "the same with the divergence of arXiv 2305.13948", ("trades", "TRADES", {"divergence": "decoupled"})
    ),
    "start": Method("the network at the start", multi_similarity, trains=False),
    "fare": _fare("arXiv 2402.12336: FARE"),
    "fare-one-step": _fare_one_step("FARE with 1 step of 2.5 eps"),
    "fare-ms-one-step": _fare_one_step(
        "FARE with 1 step, and the loss of rows and copies", loss_weight=0.5, loss_with="copies"
    ),
    "fare-clean-one-step": _fare_one_step("FARE with 1 step, clean rows too", clean_weight=1.0),
    "fare-clean": _fare("FARE, clean rows too", clean_weight=1.0),
    "one-step": _saving("preset-both with 1 step of 2.5 eps", lambda p: attacks.preset(p.preset_eps, 1)),
    "two-steps": _saving("preset-both with 2 steps", lambda p: attacks.preset(p.preset_eps, 2)),
    "noisy-step": _saving("preset-both with N-FGSM", lambda p: partial(NFGSM, eps=p.preset_eps)),
    "early-stop": _saving("preset-both, broken rows at rest", lambda p: partial(FriendlyPGD, eps=p.preset_eps)),
    "hard-rows": Method("preset-both on half of the rows", both, plugins=lambda p: [HardRows(0.5)], **_PRESET),
    "reuse": Method(
        "preset-both with 1 step from where it was",
        both,
        plugins=lambda p: [ATTA(p.preset_eps)],
        options=_preset_without_its_attack,
        warmup=0.5,
    ),
    "replay": Method(
        "preset-both, each batch 4 times, no attack steps",
        both,
        plugins=lambda p: [FreeAT(p.preset_eps)],
        replays=4,
        options=_preset_without_its_attack,
        warmup=0.5,
    ),
    "bfloat16-attack": _saving("preset-both, attack in bfloat16", lambda p: Autocast(attacks.preset(p.preset_eps))),
}
