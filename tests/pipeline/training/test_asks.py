"""What is asked for repeats by number, is said in words, and changes in all that a switch is about."""

from pipeline.training import world
from pipeline.training.asks import CLIPS_SEED, DRIFT_SEED, asks, switches


def test_an_ask_is_a_pure_function_of_its_number_and_more_asks_begin_with_the_same() -> None:
    assert asks(CLIPS_SEED, 5) == asks(CLIPS_SEED, 8)[:5]
    assert asks(CLIPS_SEED, 5) != asks(DRIFT_SEED, 5)


def test_only_single_movers_are_asked_for_and_only_what_the_prompt_says_is_expected() -> None:
    for ask in asks(CLIPS_SEED, 60):
        assert ask.scene.second is None
        assert f"{ask.scene.colour} {ask.scene.subject}" in ask.prompt
        assert {"subject", "colour"} <= ask.words.keys()
        assert all(getattr(ask.scene, name) == word for name, word in ask.words.items())


def test_a_switch_changes_everything_but_the_motion_and_stays_in_its_stream() -> None:
    for change in switches(60):
        before, after = change.before, change.after
        for name in ("subject", "colour", "place", "style"):
            assert getattr(before.scene, name) != getattr(after.scene, name)
        for name in ("motion", "speed", "layout_seed"):
            assert getattr(before.scene, name) == getattr(after.scene, name)
        assert before.seed == after.seed
        assert {"subject", "colour"} <= change.words.keys() <= {"subject", "colour", "place", "style"}
        assert after.scene.style in world.STYLES
