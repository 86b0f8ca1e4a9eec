"""Who races: rivals as third-party code, the energy with its recipes, and the floor."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from racing.contrastive import Contrastive
from racing.masked import MaskedAutoencoder, SimMIM
from racing.methods import Method, Setting
from racing.recipes import (
    CONVOLUTIONAL,
    CONVOLUTIONAL_JUDGING,
    DENSE,
    EXCERPT,
    MASKED,
    SPARSE,
    TWO_HEADS,
    XAVIER,
)
from racing.restoring import Restoring

Kind = Literal["energy", "mae", "simmim", "simclr", "untrained"]


@dataclass(frozen=True)
class Contender:
    """One line of the results.

    Args:
        name: of its files.
        title: for readers.
        backbone: "vit" or "convnext".
        kind: what it is trained by.
        recipe: of the energy.
        epochs_share: length of its schedule over that of a whole run.
        seconds_of: another contender, whose whole run's seconds its schedule fills; the share is
            then measured.
        tuned_as: the contender whose learning rate, layer and pooling it takes; itself by default.
    """

    name: str
    title: str
    backbone: str
    kind: Kind
    recipe: Mapping[str, Any] = field(default_factory=dict, hash=False)
    epochs_share: float = 1.0
    seconds_of: str | None = None
    tuned_as: str = ""

    @property
    def tuned(self) -> str:
        """The contender that was tuned for this one."""
        return self.tuned_as or self.name

    @property
    def is_trained(self) -> bool:
        """Whether there is anything to pretrain."""
        return self.kind != "untrained"

    def method(self, setting: Setting) -> Method:
        """Its pretraining, at the first step."""
        match self.kind:
            case "energy":
                return Restoring(setting, self.recipe)
            case "mae":
                return MaskedAutoencoder(setting)
            case "simmim":
                return SimMIM(setting)
            case _:
                assert self.is_trained
                return Contrastive(setting)


TITLES = {"mae": "MAE", "simmim": "SimMIM"}


def _at_seconds_of(tuned: str, recipe: Mapping[str, Any], title: str, rival: str) -> Contender:
    return Contender(
        f"{tuned}-{rival}-seconds", f"{title}, as many seconds as {TITLES[rival]}", "vit",
        "energy", recipe, seconds_of=rival, tuned_as=tuned,
    )  # fmt: skip


# In the order in which they run, seed by seed: what the bars need comes first.
CONTENDERS = (
    Contender("untrained", "untrained / from scratch", "vit", "untrained"),
    Contender("mae", "MAE (transformers)", "vit", "mae"),
    Contender("mae-half", "MAE, half the epochs", "vit", "mae", epochs_share=0.5, tuned_as="mae"),
    Contender("simmim", "SimMIM (transformers)", "vit", "simmim"),
    Contender("energy", "energy", "vit", "energy", DENSE),
    _at_seconds_of("energy", DENSE, "energy", "mae"),
    Contender("energy-half", "energy, half the epochs", "vit", "energy", DENSE, 0.5,
              tuned_as="energy"),
    Contender("twoheads", "energy, two heads", "vit", "energy", TWO_HEADS),
    _at_seconds_of("twoheads", TWO_HEADS, "energy, two heads", "mae"),
    Contender("twoheads-half", "energy, two heads, half the epochs", "vit", "energy",
              TWO_HEADS, 0.5, tuned_as="twoheads"),
    Contender("xavier", "energy, started as MAE", "vit", "energy", XAVIER),
    Contender("masked", "energy, started as MAE, mostly masking", "vit", "energy", MASKED),
    _at_seconds_of("masked", MASKED, "energy, started as MAE, mostly masking", "mae"),
    _at_seconds_of("masked", MASKED, "energy, started as MAE, mostly masking", "simmim"),
    Contender("excerpt", "energy, started as MAE, half of each image", "vit", "energy", EXCERPT),
    _at_seconds_of("excerpt", EXCERPT, "energy, started as MAE, half of each image", "mae"),
    # One step of the warm-up: what the louder positions of its random weights are worth.
    Contender("energy-start", "energy, untrained", "vit", "energy", DENSE, 1e-6,
              tuned_as="energy"),
    Contender("sparse", "energy, sparse", "vit", "energy", SPARSE),
    _at_seconds_of("sparse", SPARSE, "energy, sparse", "mae"),
    _at_seconds_of("energy", DENSE, "energy", "simmim"),
    _at_seconds_of("sparse", SPARSE, "energy, sparse", "simmim"),
    _at_seconds_of("twoheads", TWO_HEADS, "energy, two heads", "simmim"),
    Contender("convnext-untrained", "ConvNeXt untrained / from scratch", "convnext", "untrained"),
    Contender("convnext-energy", "ConvNeXt, energy", "convnext", "energy", CONVOLUTIONAL),
    Contender("convnext-judging", "ConvNeXt, energy that judges, too", "convnext", "energy",
              CONVOLUTIONAL_JUDGING),
    Contender("convnext-judging-long", "ConvNeXt, energy that judges, too, twice the epochs",
              "convnext", "energy", CONVOLUTIONAL_JUDGING, 2.0, tuned_as="convnext-judging"),
    Contender("simclr", "SimCLR (lightly)", "vit", "simclr"),
    Contender("convnext-simclr", "ConvNeXt, SimCLR (lightly)", "convnext", "simclr"),
)  # fmt: skip
BY_NAME = {contender.name: contender for contender in CONTENDERS}
