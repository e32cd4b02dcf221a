"""What a model is asked for when it is evaluated: scenes of one mover, said in words, and changes from one to another.

Every ask is a pure function of (seed, number); the seeds are no stage's of the training. Knows no model and no probe.
"""

from dataclasses import dataclass, replace
from typing import Any

from pipeline.training import world
from pipeline.training.autoencoder import item_rng
from pipeline.training.captions import caption
from pipeline.training.measures import meant

CLIPS_SEED, DRIFT_SEED, SWITCH_SEED = 51, 52, 53
_CHANGED = {
    "subject": world.SUBJECTS,
    "colour": world.COLOURS,
    "place": world.PLACES,
    "style": world.STYLES,
}


@dataclass(frozen=True)
class Ask:
    """seed: of the stream that is to show the scene."""

    scene: world.Scene
    prompt: str
    seed: int

    @property
    def words(self) -> dict[str, str]:
        """The words that the prompt really says, by attribute."""
        return meant(self.scene, self.prompt)


@dataclass(frozen=True)
class Switch:
    """A stream whose prompt changes on the way: another subject, colour, place and style, in the same motion."""

    before: Ask
    after: Ask

    @property
    def words(self) -> dict[str, str]:
        """What has to be seen after the change, and was not asked for before."""
        return {name: word for name, word in self.after.words.items() if name in _CHANGED}


def asks(seed: int, count: int) -> list[Ask]:
    return [_ask(seed, number) for number in range(count)]


def switches(count: int, seed: int = SWITCH_SEED) -> list[Switch]:
    return [_switch(seed, number) for number in range(count)]


def _ask(seed: int, number: int) -> Ask:
    rng = item_rng(seed, number)
    scene = replace(world.sample_scene(rng), second=None)
    return Ask(scene, caption(scene, rng), int(rng.integers(2**31)))


def _switch(seed: int, number: int) -> Switch:
    before, rng = _ask(seed, number), item_rng(seed, number, 1)
    changed: dict[str, Any] = {}
    for name, words in _CHANGED.items():
        others = [word for word in words if word != getattr(before.scene, name)]
        changed[name] = others[int(rng.integers(len(others)))]
    scene = replace(before.scene, **changed)
    return Switch(before, Ask(scene, caption(scene, rng), before.seed))
