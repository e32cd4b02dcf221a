import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming.messages import (
    CandidateMessage,
    ControlsMessage,
    OfferMessage,
    PictureMessage,
    PingMessage,
    ResetMessage,
    WireError,
    parse,
)


def code_of(message: Any, prompt_limit: int = 300) -> str:
    with pytest.raises(WireError) as caught:
        parse(message if isinstance(message, str) else json.dumps(message), prompt_limit)
    assert caught.value.remedy
    assert len(caught.value.message) < 300
    return caught.value.code


def test_every_kind_is_read() -> None:
    assert parse('{"kind": "offer", "sdp": "v=0"}') == OfferMessage(kind="offer", sdp="v=0")
    assert parse('{"kind": "reset", "id": 3}') == ResetMessage(kind="reset", id=3)
    assert parse('{"kind": "ping", "id": 4}') == PingMessage(kind="ping", id=4)
    assert parse('{"kind": "picture", "id": 5, "data": null}') == PictureMessage(kind="picture", id=5, data=None)
    candidate = {"kind": "candidate", "candidate": None, "sdpMid": "0", "sdpMLineIndex": 0}
    assert parse(json.dumps(candidate)) == CandidateMessage(**candidate)


def test_controls_carry_only_what_changes() -> None:
    controls = parse('{"kind": "controls", "id": 1, "prompt": "a red fox, 雪", "strength": 1}')
    assert isinstance(controls, ControlsMessage)
    assert controls.prompt == "a red fox, 雪"
    assert controls.strength == 1.0
    assert (controls.seed, controls.paused, controls.camera) == (None, None, None)


@pytest.mark.parametrize("text", ["", "{", "nonsense", "[1]", '"offer"', "3", "null", "[" * 9000, '{"id": NaN}'])
def test_what_is_not_a_json_object_is_refused(text: str) -> None:
    assert code_of(text) in ("json_invalid", "message_too_large")


def test_lone_surrogates_are_refused() -> None:
    assert code_of("\ud800") == "json_invalid"
    assert code_of('{"kind": "controls", "id": 1, "prompt": "\\ud800"}') in ("json_invalid", "field_invalid")


def test_unknown_and_missing_kinds_are_told_apart() -> None:
    assert code_of({"kind": "launch", "id": 1}) == "kind_unknown"
    assert code_of({"kind": ["offer"]}) == "kind_unknown"
    assert code_of({"id": 1}) == "field_missing"


@pytest.mark.parametrize(
    "change",
    [
        {"seed": -1},
        {"seed": 2**31},
        {"seed": 1.5},
        {"seed": "7"},
        {"seed": True},
        {"strength": -0.01},
        {"strength": 1.01},
        {"strength": "0.5"},
        {"structure": -0.01},
        {"structure": 1.01},
        {"structure": "0.5"},
        {"regions": -0.01},
        {"regions": 1.01},
        {"regions": "0.5"},
        {"transition": "fade"},
        {"glide_chunks": 0},
        {"glide_chunks": 65},
        {"steps": 33},
        {"steps": 1.5},
        {"lora": 1},
        {"lora": "x" * 201},
        {"lora_strength": 4.5},
        {"motion_aware": "yes"},
        {"motion_aware": 1},
        {"paint": 1},
        {"paint": "012"},
        {"paint": "000"},
        {"paint": "01" * 2049},
        {"paused": 1},
        {"camera": "yes"},
        {"prompt": 5},
        {"prompt": "a\x00b"},
        {"prompt": "two\nlines"},
        {"id": -1},
        {"id": None},
        {"extra": 1},
    ],
)
def test_a_control_out_of_range_or_of_the_wrong_type_is_refused(change: dict[str, Any]) -> None:
    assert code_of({"kind": "controls", "id": 1, **change}) == "field_invalid"


def test_a_missing_field_is_named() -> None:
    with pytest.raises(WireError, match="`id`") as caught:
        parse('{"kind": "ping"}')
    assert caught.value.code == "field_missing"


def test_a_prompt_may_be_as_long_as_the_limit_and_no_longer() -> None:
    assert parse(json.dumps({"kind": "controls", "id": 1, "prompt": "x" * 20}), prompt_limit=20)
    assert code_of({"kind": "controls", "id": 1, "prompt": "x" * 21}, prompt_limit=20) == "prompt_too_long"


def test_a_picture_may_be_larger_and_says_itself_when_it_is_too_large() -> None:
    assert parse(json.dumps({"kind": "picture", "id": 1, "data": "A" * 699_000}))
    assert code_of({"kind": "picture", "id": 1, "data": "A" * 720_000}) == "picture_too_large"
    assert code_of({"kind": "picture", "id": 1}) == "field_missing"
    assert code_of("x" * 2_000_000) == "message_too_large"


def test_only_an_offer_may_be_large() -> None:
    assert parse(json.dumps({"kind": "offer", "sdp": "x" * 60_000}))
    assert code_of({"kind": "offer", "sdp": "x" * 66_000}) == "message_too_large"
    assert code_of({"kind": "controls", "id": 1, "prompt": "x" * 9_000}) == "message_too_large"


def test_an_error_never_repeats_a_large_input() -> None:
    for message in ({"kind": "k" * 5000}, {"kind": "ping", "id": 1, "f" * 5000: 1}, {"kind": "ping", "id": "i" * 5000}):
        with pytest.raises(WireError) as caught:
            parse(json.dumps(message))
        assert len(caught.value.message + caught.value.remedy) < 300


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    [
        "id",
        "sdp",
        "candidate",
        "sdpMid",
        "sdpMLineIndex",
        "prompt",
        "seed",
        "strength",
        "structure",
        "transition",
        "glide_chunks",
        "steps",
        "lora",
        "lora_strength",
        "motion_aware",
        "paused",
        "camera",
        "x",
    ]
)
KINDS = st.sampled_from(["offer", "candidate", "controls", "reset", "ping", "other"]) | JSON
LOOKALIKES = st.builds(
    lambda kind, fields: json.dumps({"kind": kind, **fields}), KINDS, st.dictionaries(FIELDS, JSON, max_size=5)
)
ANY_TEXT = st.text(st.characters(exclude_categories=()))


@given(ANY_TEXT | LOOKALIKES | JSON.map(json.dumps))
def test_parse_raises_nothing_but_wire_errors(text: str) -> None:
    with suppress(WireError):
        parse(text)
