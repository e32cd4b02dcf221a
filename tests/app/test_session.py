"""One stream's life, with every neighbour a fake and time in the test's hands."""

import asyncio
import json
from base64 import b64encode
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from app.admission import Admission
from app.errors import AppError
from app.house import ChannelClosedError
from app.states import MOVES, State
from tests.app.fakes import COLOURS, CONFIG, FakeWorker, running, settle
from tests.app.scene import Scene, scene
from tests.streaming.viewer import until


def test_every_state_can_close_and_a_closed_session_stays_closed() -> None:
    assert set(MOVES) == set(State)
    assert all(State.CLOSED in moves for state, moves in MOVES.items() if state is not State.CLOSED)
    assert MOVES[State.CLOSED] == frozenset()


async def test_the_page_is_welcomed_with_the_model_and_the_defaults() -> None:
    async with scene() as made:
        (welcome,) = made.page.of("welcome")

    assert welcome["model"]["width"] == CONFIG.width
    assert welcome["model"]["frames_per_chunk"] == CONFIG.frames_per_chunk
    assert welcome["defaults"] == {
        "prompt": "a red ball",
        "seed": 7,
        "strength": 0.6,
        "structure": 0.0,
        "regions": 0.0,
        "transition": "cut",
        "glide_chunks": 4,
        "steps": 0,
        "lora": "",
        "lora_strength": 1.0,
        "motion_aware": False,
    }


async def test_an_offer_is_answered_and_the_first_chunk_is_made_before_media_connects() -> None:
    async with scene() as made:
        await made.say("offer", sdp="v=0")
        await made.worker.make()

        assert made.page.of("answer")[0]["sdp"] == "answer to v=0"
        assert made.page.states == ["connecting"]
        assert made.track.queue_frames == CONFIG.frames_per_chunk

        made.peer.on_state("connected")
        assert made.page.states == ["connecting", "live"]


async def test_candidates_that_come_before_the_offer_reach_the_peer() -> None:
    async with scene() as made:
        await made.say("candidate", candidate="candidate:1 1 udp 1 127.0.0.1 9 typ host", sdpMid="0")
        await made.say("offer", sdp="v=0")
        await made.say("candidate", candidate=None)

        assert [bool(candidate) for candidate in made.peer.candidates] == [True, False]


async def test_a_full_track_asks_for_no_more_chunks(live: Scene) -> None:
    await live.worker.make()
    await live.worker.make()
    made_so_far = len(live.worker.orders)
    await settle()

    assert made_so_far == len(live.worker.orders) == 2
    live.track.show()
    await settle()
    assert len(live.worker.orders) == 3


async def test_a_new_prompt_is_acked_with_the_first_chunk_that_follows_it(live: Scene) -> None:
    await live.worker.make()
    await live.say("controls", id=5, prompt="a green ball")
    assert live.page.of("ack") == []

    await live.worker.make()

    assert live.page.of("ack") == [{"kind": "ack", "id": 5, "epoch": 1, "chunk": 2}]
    assert live.worker.orders[-1].controls.prompt == "a green ball"


async def test_the_old_prompts_frames_play_until_the_new_ones_are_there_and_are_dropped_then(live: Scene) -> None:
    await live.worker.make()
    await live.worker.make()
    await live.say("controls", id=5, prompt="a green ball")
    assert live.track.queue_frames == CONFIG.frames_per_chunk
    assert live.worker.orders[-1].controls.prompt == "a green ball"

    await live.worker.make()
    first = live.track.show()[0]

    assert first[0, 60].tolist() == list(COLOURS["green"])
    assert live.track.frames_dropped > 0


async def test_quick_changes_one_after_the_other_do_not_starve_the_picture(live: Scene) -> None:
    for number in range(6):
        await live.say("controls", id=number, prompt=f"a ball number {number}")
        await live.worker.make()
        live.track.show()

    assert live.track.frames_shown >= 4 * CONFIG.frames_per_chunk


async def test_the_page_hears_when_its_change_is_shown_and_how_long_that_took(live: Scene) -> None:
    await live.say("controls", id=9, prompt="a blue ball")
    await live.worker.make()
    await live.worker.make()
    await live.clock.advance(0.5)
    live.track.show()

    assert live.page.of("shown") == [{"kind": "shown", "id": 9, "latency_ms": 500.0}]


async def test_controls_that_change_nothing_are_acked_at_once(live: Scene) -> None:
    await live.say("controls", id=1, prompt="a red ball", seed=7)

    assert live.page.of("ack") == [{"kind": "ack", "id": 1, "epoch": 0, "chunk": 1}]


@pytest.mark.parametrize("change", [("reset", {}), ("controls", {"seed": 8})])
async def test_a_reset_or_another_seed_starts_the_stream_again(live: Scene, change: tuple[str, dict[str, int]]) -> None:
    await live.worker.make()
    await live.worker.make()
    await live.say(change[0], id=2, **change[1])

    assert live.worker.orders[-1].fresh
    assert live.page.of("ack")[-1]["chunk"] == 0


def in_base64(colour: tuple[int, int, int]) -> str:
    file = BytesIO()
    Image.new("RGB", (90, 50), colour).save(file, "PNG")
    return b64encode(file.getvalue()).decode()


async def test_a_picture_begins_the_stream_anew_and_so_does_clearing_it(live: Scene) -> None:
    await live.worker.make()
    for id, data in enumerate((in_base64((9, 60, 30)), None)):
        await live.say("picture", id=id, data=data)
        await until(lambda id=id: live.session._feed.epoch > id)
        while not live.worker.orders[-1].fresh or live.worker.orders[-1].controls.epoch <= id:
            await live.worker.make()
    first, second = [order for order in live.worker.orders if order.fresh][-2:]

    assert first.source_THWC is not None and second.source_THWC is None
    assert first.source_THWC.shape == (CONFIG.pictures(0), CONFIG.height, CONFIG.width, 3)
    assert (first.source_THWC == (9, 60, 30)).all()
    assert (first.controls.strength, second.controls.strength) == (0.0, 0.6)


async def test_a_picture_that_cannot_be_used_is_said_and_the_stream_goes_on(live: Scene) -> None:
    await live.worker.make()
    for id, data in enumerate(("", "bm90aGluZw==", "@@@@")):
        await live.say("picture", id=id, data=data)
        await until(lambda id=id: len(live.page.codes) > id)
    await live.worker.make()

    assert live.page.codes == ["picture_empty", "picture_unreadable", "picture_unreadable"]
    assert not any(order.fresh for order in live.worker.orders[1:])
    assert live.page.states[-1] == "live"


async def test_pause_lets_the_picture_rest_and_going_on_asks_again(live: Scene) -> None:
    await live.worker.make()
    await live.say("controls", id=1, paused=True)
    await live.worker.make()
    asked = len(live.worker.orders)
    await settle()

    assert live.page.states[-1] == "paused"
    assert live.track.queue_frames == 0
    assert len(live.worker.orders) == asked

    await live.say("controls", id=2, paused=False)
    assert live.page.states[-1] == "live"
    assert live.track.queue_frames > 0
    assert len(live.worker.orders) == asked + 1


async def test_a_refused_prompt_is_said_and_the_next_prompt_is_drawn(live: Scene) -> None:
    await live.worker.make()
    await live.say("controls", id=1, prompt="refuse")
    await live.worker.make()
    assert live.page.codes == ["prompt_refused"]
    asked = len(live.worker.orders)

    await live.say("controls", id=2, prompt="a green ball")
    assert len(live.worker.orders) == asked + 1
    await live.worker.make()
    assert live.track.show()[0][0, 60].tolist() == list(COLOURS["green"])


async def test_words_that_the_model_does_not_know_are_named_until_they_are_gone(live: Scene) -> None:
    for number, prompt in enumerate(("a red dragon", "a blue dragon", "a blue ball")):
        await live.say("controls", id=number, prompt=prompt)
        for _ in range(3):
            await live.worker.make()
            live.track.show()

    assert [notice["unknown_words"] for notice in live.page.of("notice")] == [["dragon"], []]


async def test_a_lost_worker_is_told_and_the_stream_resumes_from_its_controls(live: Scene) -> None:
    await live.say("controls", id=1, prompt="a blue ball")
    await live.worker.make()
    await live.worker.die()
    assert live.page.states[-1] == "recovering"

    await live.worker.come_back()
    assert live.page.states[-1] == "live"
    assert live.worker.orders[-1].fresh
    assert live.worker.orders[-1].controls.prompt == "a blue ball"


async def test_a_prompt_that_ends_the_worker_again_and_again_ends_the_session(live: Scene) -> None:
    for _ in range(3):
        await live.worker.die()
        await live.worker.come_back()

    assert live.page.codes == ["worker_failed"]
    assert live.page.of("error")[-1]["fatal"]
    assert live.page.states[-1] == "closed"


async def test_memory_that_runs_out_again_and_again_is_told_as_that(live: Scene) -> None:
    for _ in range(3):
        await live.worker.die(AppError("memory_short", "Memory ran out.", "Choose a smaller picture."))
        await live.worker.come_back()

    assert live.page.codes == ["memory_short"]
    assert live.page.of("error")[-1]["fatal"]


async def test_strength_and_structure_reach_the_next_chunk_and_stay(live: Scene) -> None:
    await live.say("controls", id=1, strength=0.9, structure=0.4)
    await live.say("controls", id=2, structure=0.5)
    await live.worker.make()
    await live.worker.make()
    controls = live.worker.orders[-1].controls
    assert (controls.strength, controls.structure) == (0.9, 0.5)


async def test_keeping_closer_to_fast_motion_is_switched_on_and_off(live: Scene) -> None:
    for id, wanted in enumerate((True, False)):
        await live.say("controls", id=id, motion_aware=wanted)
        await live.worker.make()
        await live.worker.make()
        assert live.worker.orders[-1].controls.motion_aware is wanted


async def test_the_dial_and_a_painted_mask_reach_the_next_chunk_and_each_chunk_tells_what_was_computed(
    live: Scene,
) -> None:
    await live.worker.make()
    assert not live.page.of("regions")
    await live.say("controls", id=1, regions=0.5, paint="01")
    await live.worker.make()
    controls = live.worker.orders[-1].controls
    assert (controls.regions, controls.paint) == (0.5, "01")
    told = live.page.of("regions")[-1]
    assert (told["active"], told["active_fraction"]) == ("", 1.0)
    await live.say("controls", id=2, regions=0, paint="")
    await live.worker.make()
    assert live.worker.orders[-1].controls.paint == ""


async def make(live: Scene, count: int, chunk_ms: float, active: list[int] | None) -> None:
    """Chunks that took so long, of which these tiles were computed."""
    live.worker.chunk_ms, live.worker.active_HW = chunk_ms, None if active is None else np.array([active], bool)
    for _ in range(count):
        await live.worker.make()
        live.track.show()
        await settle()


async def test_what_sparse_chunks_save_is_told_once_a_few_of_both_kinds_of_chunk_were_timed(live: Scene) -> None:
    await live.say("controls", id=1, regions=0.5)
    await make(live, 4, 100.0, None)
    await make(live, 2, 60.0, [0, 1])
    assert [told["saved"] for told in live.page.of("regions")] == [None] * 6
    await make(live, 1, 60.0, [0, 1])
    told = live.page.of("regions")[-1]
    assert (told["active"], told["active_fraction"], told["chunk_ms"], told["saved"]) == ("01", 0.5, 60.0, 0.4)
    await make(live, 16, 150.0, [1, 0])
    assert live.page.of("regions")[-1]["saved"] == -0.5


async def test_a_dial_or_a_mask_for_a_model_that_cannot_hold_tiles_is_answered_once_and_the_stream_goes_on() -> None:
    student = replace(CONFIG.student, patch_size=(1, 1, 1))
    async with scene(config=replace(CONFIG, width=80, height=48, student=student)) as made:
        await made.go_live()
        await made.worker.make()
        assert made.page.codes == []
        await made.say("controls", id=1, regions=0.5)
        await make(made, 3, 10.0, None)
        await made.say("controls", id=2, paint="1")
        await make(made, 2, 10.0, None)

        (error,) = made.page.of("error")
        assert (error["code"], error["fatal"]) == ("regions_unsupported", False)
        assert made.page.states[-1] == "live"


async def test_changes_while_paused_are_bounded_and_each_is_acked_once(live: Scene) -> None:
    await live.say("controls", id=0, paused=True)
    for number in range(1, 301):
        await live.say("controls", id=number, strength=number / 400)
    before = len(live.page.of("ack"))
    assert before >= 300 - 64
    await live.say("controls", id=999, paused=False)
    await live.worker.make()
    live.track.show()
    await live.worker.make()
    acked = [ack["id"] for ack in live.page.of("ack") if 1 <= ack["id"] <= 300]
    assert sorted(acked) == list(range(1, 301))
    assert live.worker.orders[-1].controls.strength == 300 / 400


async def test_statistics_come_each_second(live: Scene) -> None:
    await live.worker.make()
    live.track.show()
    await live.clock.advance(1.0)
    (stats,) = live.page.of("stats")

    assert stats["fps"] == CONFIG.frames_per_chunk
    assert stats["chunk_ms"] == 10.0
    assert set(stats) == {
        "kind", "fps", "chunk_ms", "latency_ms", "queue_frames", "dropped_frames", "camera_fps", "lag_ms",
    }  # fmt: skip


@pytest.mark.parametrize("said", [(), ("ping",)])
async def test_a_page_that_makes_no_offer_is_closed_with_a_reason(said: tuple[str, ...]) -> None:
    async with scene() as made:
        for kind in said:
            await made.say(kind, id=1)
        await made.clock.advance(15)
        await made.task

        assert made.page.codes == ["silent_client"]
        assert made.page.states == ["closed"]


async def test_media_that_never_connects_is_closed_with_a_reason_and_frees_the_place() -> None:
    admission = Admission([FakeWorker()], 0)
    async with scene(admission) as made:
        await made.say("offer", sdp="v=0")
        await made.clock.advance(20)
        await made.task

        assert made.page.codes == ["media_unreachable"]
        assert made.peer.closed
    async with scene(admission) as second:
        await second.say("offer", sdp="v=0")
        assert second.page.states == ["connecting"]


async def test_media_that_is_lost_ends_the_session_but_the_page_may_come_back(live: Scene) -> None:
    live.peer.on_state("failed")
    await live.task

    assert live.page.codes == ["media_lost"]
    assert not live.page.of("error")[0]["fatal"]


async def test_a_page_that_leaves_frees_everything(live: Scene) -> None:
    live.page.said.put_nowait(ChannelClosedError())
    await live.task

    assert live.peer.closed
    assert live.page.codes == []


async def test_a_second_page_waits_for_its_turn_and_starts_by_itself() -> None:
    admission = Admission([FakeWorker()], 1)
    async with scene(admission) as first, scene(admission) as second, scene(admission) as third:
        await first.go_live()
        await second.say("offer", sdp="v=0")
        await third.say("offer", sdp="v=0")

        assert second.page.codes == ["server_busy"]
        assert second.page.of("state")[-1]["note"] == "You are number 1 in the queue."
        assert third.page.of("error")[-1]["code"] == "server_busy"
        assert third.page.of("error")[-1]["fatal"]

        first.page.said.put_nowait(ChannelClosedError())
        await settle()
        assert second.page.states == ["waiting", "connecting"]
        assert second.page.of("answer")


async def test_a_page_that_leaves_the_queue_moves_the_others_up() -> None:
    admission = Admission([FakeWorker()], 2)
    async with scene(admission) as first, scene(admission) as second, scene(admission) as third:
        for made in (first, second, third):
            await made.say("offer", sdp="v=0")
        second.page.said.put_nowait(ChannelClosedError())
        await settle()

        assert third.page.of("state")[-1]["note"] == "You are number 1 in the queue."


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("{", "json_invalid"),
        ("[]", "json_invalid"),
        ('{"kind": "dance"}', "kind_unknown"),
        ('{"id": 1}', "field_missing"),
        ('{"kind": "controls", "id": 1, "strength": 1.5}', "field_invalid"),
        ('{"kind": "controls", "id": 1, "motion_aware": "fast"}', "field_invalid"),
        ('{"kind": "controls", "id": 1, "seed": -1}', "field_invalid"),
        ('{"kind": "controls", "id": 1, "prompt": 3}', "field_invalid"),
        (json.dumps({"kind": "controls", "id": 1, "prompt": "x" * 41}), "prompt_too_long"),
        ("x" * 200_000, "message_too_large"),
    ],
)
async def test_bad_messages_get_a_clear_answer_and_the_session_lives_on(live: Scene, text: str, code: str) -> None:
    live.page.said.put_nowait(text)
    await live.say("ping", id=3)

    assert live.page.codes == [code]
    assert live.page.of("error")[0]["next"]
    assert live.page.of("pong") == [{"kind": "pong", "id": 3}]


async def test_a_second_offer_is_refused(live: Scene) -> None:
    await live.say("offer", sdp="v=0")

    assert live.page.codes == ["already_started"]


async def test_a_fault_of_our_own_is_named_without_a_trace(live: Scene, caplog: pytest.LogCaptureFixture) -> None:
    live.page.said.put_nowait(RuntimeError("a secret detail"))
    await live.task

    (error,) = live.page.of("error")
    assert error["code"] == "internal_error"
    assert "secret" not in json.dumps(error)
    assert "a secret detail" in caplog.text


async def test_a_caller_cancelled_just_as_its_turn_comes_passes_the_place_on() -> None:
    admission = Admission(["worker"], 2)
    order: list[int] = []

    async def hold(number: int) -> None:
        async with admission.place(lambda place: None):
            order.append(number)
            await asyncio.Future()

    async with running(hold(0)) as first, running(hold(1)) as second, running(hold(2)):
        first.cancel()
        await asyncio.sleep(0)
        second.cancel()
        await settle()

        assert order[0] == 0
        assert order[-1] == 2


async def test_a_full_queue_says_so() -> None:
    admission = Admission(["worker"], 0)
    async with admission.place(lambda place: None):
        with pytest.raises(AppError) as busy:
            async with admission.place(lambda place: None):
                pass

    assert busy.value.code == "server_busy"
