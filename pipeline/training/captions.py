"""Words for scenes: a small grammar with synonyms, word orders and parts left out, as a person would type them.

The colour and the subject are always named. What a caption leaves unsaid, the scene may have in any way;
'flat' is left unsaid mostly, so a prompt without a style means flat.
"""

import re

import numpy as np

from pipeline.training.world import COLOURS, SUBJECTS, Scene

_VERBS = {
    "moves left": ("moves left", "goes left", "moves to the left", "drifts to the left", "travels left"),
    "moves right": ("moves right", "goes right", "moves to the right", "drifts to the right", "travels right"),
    "bounces": ("bounces", "bounces up and down", "jumps up and down", "hops"),
    "circles": ("circles", "moves in circles", "goes around in circles", "flies in a circle"),
    "sways": ("sways", "swings from side to side", "sways from side to side", "dances"),
    "stands still": ("stands still", "rests", "does not move", "waits"),
}
_GERUNDS = {
    "moves left": ("moving left", "going left", "moving to the left", "drifting to the left", "travelling left"),
    "moves right": ("moving right", "going right", "moving to the right", "drifting to the right"),
    "bounces": ("bouncing", "bouncing up and down", "jumping up and down", "jumping", "hopping"),
    "circles": ("circling", "moving in circles", "going around in circles", "flying in a circle"),
    "sways": ("swaying", "swinging from side to side", "swaying from side to side", "dancing"),
    "stands still": ("standing still", "resting", "not moving", "waiting", "standing"),
}
_PACES = {
    "slowly": ("slowly", "gently", "very slowly"),
    "": ("",),
    "quickly": ("quickly", "fast", "very fast"),
}
_PLACES = {
    "dark room": ("in a dark room", "in the dark room", "in the dark", "inside a dark room"),
    "theatre": ("in a theatre", "on a stage", "in a theater", "in front of an audience", "on stage in a theatre"),
    "beach": ("on the beach", "at the beach", "by the sea", "on a sunny beach"),
    "park": ("in the park", "in a park", "in a green park", "among the trees"),
    "city at night": ("in the city at night", "in a city at night", "in a night city", "at night in the city"),
    "snow field": ("in the snow", "in a snow field", "on a snowy field", "in winter"),
    "desert": ("in the desert", "in a desert", "among desert dunes"),
    "under water": ("under water", "underwater", "in the ocean", "under the sea"),
}
_STYLES = {
    "flat": ("flat style", "cartoon style", "flat colours", "simple cartoon"),
    "pastel": ("pastel style", "pastel colours", "soft pastel", "in pastel", "pastel"),
    "neon": ("neon style", "neon lights", "glowing neon", "in neon", "neon"),
    "pencil sketch": ("pencil sketch", "pencil style", "a pencil drawing", "drawn in pencil", "sketch"),
}
_PREFIXES = {
    "flat": ("a flat cartoon of",),
    "pastel": ("a pastel picture of", "a pastel video of"),
    "neon": ("a neon picture of", "a neon video of"),
    "pencil sketch": ("a pencil sketch of", "a pencil drawing of", "a sketch of"),
}
_MOODS = ("happy", "smiling", "cute", "big", "bright")  # said at times, true of every mover
_OPENINGS = ("a video of", "a picture of", "there is")
_TOGETHER = ("and", "with", "next to")
_STYLE_NAMED = {"flat": 0.25, "pastel": 0.96, "neon": 0.96, "pencil sketch": 0.96}
_PLACE_NAMED = _MOTION_NAMED = 0.93


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One of the many ways to say the scene, drawn with the generator's next numbers."""

    def pick(choices: tuple[str, ...]) -> str:
        return choices[int(rng.integers(len(choices)))]

    article = "the " if rng.random() < 0.1 else "" if rng.random() < 0.15 else "a "
    mood = pick(_MOODS) if scene.second is None and rng.random() < 0.1 else ""
    who = _named(article, mood, scene.colour, scene.subject)
    other = ""
    if scene.second is not None:
        other = f"{pick(_TOGETHER)} {_named(article, '', *scene.second)}"
    place = pick(_PLACES[scene.place]) if rng.random() < _PLACE_NAMED else ""
    styled = rng.random() < _STYLE_NAMED[scene.style]
    prefixed = styled and rng.random() < 0.25
    style = pick(_STYLES[scene.style]) if styled and not prefixed else ""
    moving = rng.random() < _MOTION_NAMED
    doing = pick(_GERUNDS[scene.motion]) if moving else ""
    pace = pick(_PACES[scene.speed]) if moving else ""
    form = int(rng.integers(6))
    if prefixed:
        text = _join(pick(_PREFIXES[scene.style]), who, other, doing, pace, place)
    elif form == 0 and style:
        text = f"{style}: {_join(who, other, doing, pace, place)}"
    elif form == 1 and place:
        text = _listed(place, _join(who, other, doing, pace), style)
    elif form == 2:
        text = _listed(_join(who, other, doing, pace), place, style)
    elif form == 3 and moving and not other:
        text = _listed(_join(who, place, pick(_VERBS[scene.motion]), pace), style)
    elif form >= 4 and moving and not other:
        text = _listed(_join(who, pick(_VERBS[scene.motion]), pace, place), style)
    else:
        opening = pick(_OPENINGS) if not other and rng.random() < 0.3 else ""
        text = _listed(_join(opening, who, other, doing, pace, place), style)
    return text


def _named(article: str, mood: str, colour: str, subject: str) -> str:
    name = _join(mood, colour, subject)
    return f"{'an ' if article == 'a ' and name[0] in 'aeiou' else article}{name}"


def _join(*parts: str) -> str:
    return " ".join(part for part in parts if part)


def _listed(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def split(text: str) -> list[str]:
    """The words of a prompt as WORDS spells them."""
    return re.findall(r"[a-z]+", text.lower())


def _all_words() -> tuple[str, ...]:
    tables = (_VERBS, _GERUNDS, _PACES, _PLACES, _STYLES, _PREFIXES)
    phrases = [phrase for table in tables for choices in table.values() for phrase in choices]
    return tuple(
        sorted(set(split(" ".join((*phrases, *_MOODS, *_OPENINGS, *_TOGETHER, *COLOURS, *SUBJECTS, "a an the")))))
    )


WORDS: tuple[str, ...] = _all_words()
