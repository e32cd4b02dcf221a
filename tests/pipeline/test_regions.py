"""The engine with regions: what is held is held to the byte, what must be dense is dense, and the two agree."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.attention import CachedAttention
from pipeline.chunk import Chunk, Controls
from pipeline.codec import CodecMemory, PocketCodec
from pipeline.config import ModelConfig
from pipeline.engine import Engine
from pipeline.errors import PipelineError
from pipeline.motion import ProbeMotion
from pipeline.plan import SETTLE, Plan
from pipeline.region_cache import RegionAttention
from pipeline.student import Student
from pipeline.text import TextEncoder
from pipeline.tiles import Tiles

RED = Controls(prompt="red ball", regions=0.5, strength=0.6)
DENSE = replace(RED, regions=0.0)


@pytest.fixture(scope="module")
def wide(config: ModelConfig, codec: PocketCodec, text: TextEncoder, student: Student) -> Engine:
    """4 x 6 tiles."""
    return Engine(replace(config, width=192, height=128), codec, text, student)


def camera(engine: Engine, box: tuple[int, int] | None = None, gain: float = 1.0, seed: int = 0) -> np.ndarray:
    """A chunk of one textured picture, with a white box of 12 pixels at (y, x)."""
    config = engine.config
    coarse = np.random.default_rng(seed).integers(40, 160, (config.height // 8, config.width // 8, 3))
    picture = np.kron(coarse, np.ones((8, 8, 1))) * gain
    if box:
        picture[box[0] : box[0] + 12, box[1] : box[1] + 12] = 250
    return np.repeat(picture.astype(np.uint8)[None], config.frames_per_chunk, 0)


def over(chunk: Chunk) -> np.ndarray:
    assert chunk.active_HW is not None
    return np.kron(chunk.active_HW, np.ones((32, 32), bool))


def test_until_something_is_held_and_where_all_moves_a_stream_equals_the_dense_one_bit_for_bit(wide: Engine) -> None:
    ours, theirs = wide.open(7), wide.open(7)
    for seed in range(6):
        source = np.random.default_rng(seed).integers(0, 256, camera(wide).shape, dtype=np.uint8)
        one, other = wide.step(ours, RED, source), wide.step(theirs, DENSE, source)
        assert one.active_HW is None
        assert np.array_equal(one.latents_TCHW, other.latents_TCHW)
        assert np.array_equal(one.frames_THWC, other.frames_THWC)


def test_a_probed_chunk_that_stays_dense_equals_the_dense_one_bit_for_bit(wide: Engine) -> None:
    ours, theirs = wide.open(7), wide.open(7)
    for _ in range(SETTLE):
        one, other = wide.step(ours, RED), wide.step(theirs, DENSE)
        assert one.active_HW is None
        assert np.array_equal(one.latents_TCHW, other.latents_TCHW)
        assert np.array_equal(one.frames_THWC, other.frames_THWC)


def test_held_tiles_keep_every_byte_and_latent_until_they_are_computed(wide: Engine) -> None:
    state = wide.open(7)
    for _ in range(SETTLE):
        last = wide.step(state, RED, camera(wide))
    for step in range(4):
        chunk = wide.step(state, RED, camera(wide, (40, 40 + 4 * step)))
        held = ~over(chunk)
        drawn = (chunk.frames_THWC != last.frames_THWC[-1]).any((0, 3))
        assert held.mean() >= 0.4
        # A tile next to one that changed much is drawn again although its latents are held; none is so far away.
        assert not drawn[:, 128:][held[:, 128:]].any()
        cells = held[::16, ::16]
        assert np.array_equal(chunk.latents_TCHW[..., cells], np.repeat(last.latents_TCHW[-1:], 2, 0)[..., cells])
        last = chunk


def test_a_mover_in_the_source_is_computed_and_the_rest_is_not(wide: Engine) -> None:
    state = wide.open(7)
    for _ in range(SETTLE):
        wide.step(state, RED, camera(wide))
    chunk = wide.step(state, RED, camera(wide, (42, 42)))
    assert chunk.active_HW is not None
    assert chunk.active_HW[1, 1]
    assert chunk.active_HW.mean() < 0.3
    vacated = wide.step(state, RED, camera(wide))
    assert vacated.active_HW is not None
    assert vacated.active_HW[1, 1]


def test_a_level_that_follows_motion_leaves_held_what_is_held_without_it(wide: Engine) -> None:
    """And keys of a pass that were carried are still those of that pass."""
    aware, plain = wide.open(7), wide.open(7)
    less = set()
    for step in range(SETTLE + 6):
        source = camera(wide, (40, 40 + 5 * (step % 4) * step))
        one = wide.step(aware, replace(RED, motion_aware=True), source)
        other = wide.step(plain, RED, source)
        less.add(aware.noise.less)
        assert (one.active_HW is None) == (other.active_HW is None) == (step < SETTLE)
        if one.active_HW is not None and other.active_HW is not None:
            assert np.array_equal(one.active_HW, other.active_HW)
            assert one.active_HW.mean() < 0.6
            assert not np.array_equal(one.latents_TCHW, other.latents_TCHW)
        assert aware.regions is not None and plain.regions is not None
        assert aware.regions.sigmas == plain.regions.sigmas == (0.6, 0.5)
    assert len(less) > 5


@pytest.mark.parametrize(
    ("controls", "source"),
    [
        (replace(RED, prompt="blue ball"), {}),
        (replace(RED, seed=8), {}),
        (replace(RED, strength=0.9), {}),
        (replace(RED, source=1), {}),
        (RED, {"gain": 1.2}),
        (RED, {"seed": 5}),
        (RED, None),
    ],
    ids=["prompt", "seed", "strength", "another source", "light", "cut", "camera off"],
)
def test_what_changes_everything_is_dense(wide: Engine, controls: Controls, source: dict[str, float] | None) -> None:
    state = wide.open(7)
    for _ in range(SETTLE + 1):
        chunk = wide.step(state, RED, camera(wide))
    assert chunk.active_HW is not None
    frames = None if source is None else camera(wide, **source)  # type: ignore[arg-type]
    assert wide.step(state, controls, frames).active_HW is None


def test_every_tile_is_computed_before_long(wide: Engine) -> None:
    state = wide.open(7)
    seen = np.zeros(wide.config.tiles or (0, 0), bool)
    for step in range(SETTLE + 26):
        chunk = wide.step(state, RED, camera(wide))
        if step >= SETTLE:
            assert chunk.active_HW is not None
            assert chunk.active_HW.mean() <= 0.1
            seen |= chunk.active_HW
    assert seen.all()


def test_text_alone_holds_what_the_first_pass_leaves_as_it_was(wide: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model with random weights draws noise and all of it moves, so the probe's answer is given."""
    state, mask = wide.open(7), np.eye(4, 6, dtype=bool)
    last = [wide.step(state, RED) for _ in range(SETTLE + 1)][-1]
    monkeypatch.setattr(ProbeMotion, "look", lambda *_: mask)
    monkeypatch.setattr(Plan, "spreads", lambda *_: False)
    chunk = wide.step(state, RED)
    assert chunk.active_HW is not None
    assert chunk.active_HW[mask].all()
    cells = np.kron(~chunk.active_HW, np.ones((2, 2), bool))
    assert np.array_equal(chunk.latents_TCHW[0][:, cells], last.latents_TCHW[-1][:, cells])


def test_passes_run_again_with_the_neighbours_once_motion_reaches_the_border_or_these_follow_a_chunk_later(
    wide: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the corner there are three, in the middle eight, which would cost too much."""
    corner, middle = np.zeros((2, 4, 6), bool)
    corner[0, 0], middle[1, 1] = True, True
    for mask, again in ((corner, True), (middle, False)):
        state = wide.open(7)
        for _ in range(SETTLE):
            wide.step(state, RED)
        with monkeypatch.context() as patch:
            patch.setattr(ProbeMotion, "look", lambda *_, mask=mask: mask)
            chunk = wide.step(state, RED)
        assert chunk.active_HW is not None
        assert chunk.active_HW[0:2, 0:2].all() == again
        assert state.regions is not None
        assert (chunk.active_HW | state.regions.probe.moving_HW)[0:2, 0:2].all()


def test_a_reset_forgets_what_was_held(wide: Engine) -> None:
    used, fresh = wide.open(3), wide.open(7)
    for step in range(SETTLE + 2):
        wide.step(used, replace(RED, seed=3), camera(wide, (40, 40 + step)))
    wide.reset(used, 7)
    for step in range(SETTLE + 2):
        source = camera(wide, (40, 80 - step))
        one, other = wide.step(used, RED, source), wide.step(fresh, RED, source)
        assert np.array_equal(one.frames_THWC, other.frames_THWC)
        assert np.array_equal(one.latents_TCHW, other.latents_TCHW)


def test_the_dial_turned_off_gives_the_dense_chunk_and_on_again_starts_dense(wide: Engine) -> None:
    state = wide.open(7)
    for _ in range(SETTLE + 1):
        wide.step(state, RED, camera(wide))
    assert wide.step(state, DENSE, camera(wide)).active_HW is None
    assert wide.step(state, RED, camera(wide)).active_HW is None


def test_a_painted_mask_changes_the_painted_tiles_and_nothing_else(wide: Engine) -> None:
    mask = np.zeros((4, 6), bool)
    mask[1:3, 0:2] = True
    paint = "".join("1" if cell else "0" for cell in mask.flat)
    state = wide.open(7)
    last = wide.step(state, replace(RED, regions=0.0, paint=paint))
    assert last.active_HW is None
    for prompt in ("red ball", "blue"):
        chunk = wide.step(state, replace(RED, prompt=prompt, regions=0.0, paint=paint))
        assert chunk.active_HW is not None
        assert np.array_equal(chunk.active_HW, mask)
        assert not np.array_equal(
            chunk.frames_THWC[:, 32:96, 0:64], np.repeat(last.frames_THWC[-1:, 32:96, 0:64], 8, 0)
        )
        assert np.array_equal(chunk.frames_THWC[:, :, 128:], np.repeat(last.frames_THWC[-1:, :, 128:], 8, 0))
        last = chunk


def test_a_new_prompt_in_a_painted_mask_is_not_held_back_by_what_was_there(wide: Engine) -> None:
    """The past of the painted tiles is looked at no more, from then on alone and there alone."""
    mask = np.zeros((4, 6), bool)
    mask[1:3, 0:2] = True
    painted = replace(RED, regions=0.0, paint="".join("1" if cell else "0" for cell in mask.flat))
    state = wide.open(7)
    for _ in range(2):
        wide.step(state, painted)
    assert state.regions is not None
    assert not state.regions.known_from_N.any()
    for _ in range(2):
        wide.step(state, replace(painted, prompt="blue"))
        assert np.array_equal(state.regions.known_from_N.view(4, 6).numpy(), 4 * mask)
    attend = RegionAttention(state.cache, wide.student, wide.config.grid, wide.config.chunk, state.regions, (1.0,))
    whole, _ = CachedAttention(state.cache, wide.student, wide.config.grid, wide.config.chunk).past(0)
    numbers = np.array(state.cache.numbers())
    seen = (numbers[:, None] >= 4 * mask.flatten()).flatten()
    assert not seen.all()
    assert torch.equal(attend.past(0)[0], whole[:, torch.from_numpy(seen)])
    wide.reset(state, 7)
    assert not state.regions.known_from_N.any()


def test_a_camera_may_come_and_go_while_a_mask_is_painted(wide: Engine) -> None:
    """A source whose neighbours were never encoded is encoded whole; what is not painted stays to the byte."""
    mask = np.zeros((4, 6), bool)
    mask[1, 0:2] = True
    painted = replace(RED, regions=0.0, paint="".join("1" if cell else "0" for cell in mask.flat))
    state = wide.open(7)
    last = wide.step(state, painted)
    for source in (None, camera(wide), camera(wide, (40, 40)), None, camera(wide, seed=1)):
        chunk = wide.step(state, painted, source)
        assert np.array_equal(chunk.active_HW, mask)  # type: ignore[arg-type]
        assert np.array_equal(chunk.frames_THWC[:, :, 128:], np.repeat(last.frames_THWC[-1:, :, 128:], 8, 0))
        assert not np.array_equal(chunk.latents_TCHW, last.latents_TCHW)
        last = chunk


def test_all_painted_is_the_dense_chunk_bit_for_bit(wide: Engine) -> None:
    ours, theirs = wide.open(7), wide.open(7)
    for prompt in ("red ball", "red ball", "blue", "blue"):
        one = wide.step(ours, replace(RED, prompt=prompt, regions=0.0, paint="1" * 24))
        other = wide.step(theirs, replace(DENSE, prompt=prompt))
        assert one.active_HW is None
        assert np.array_equal(one.latents_TCHW, other.latents_TCHW)
        assert np.array_equal(one.frames_THWC, other.frames_THWC)


def test_of_another_source_painted_tiles_see_no_neighbour_that_the_one_before_had(wide: Engine) -> None:
    """At strength 0 a chunk is the source's latents: those of the new pictures encoded whole."""
    mask = np.zeros((4, 6), bool)
    mask[1:3, 1:3] = True
    painted = replace(RED, strength=0.0, regions=0.0, paint="".join("1" if cell else "0" for cell in mask.flat))
    state, other = wide.open(7), camera(wide, seed=1)
    for _ in range(2):
        wide.step(state, painted, camera(wide))
    chunk = wide.step(state, replace(painted, source=1), other)
    pixels = torch.from_numpy(other).permute(0, 3, 1, 2) / 127.5 - 1
    whole = wide.codec.encode_push(CodecMemory(), pixels)
    assert whole is not None
    assert np.array_equal(chunk.active_HW, mask)  # type: ignore[arg-type]
    cells = np.kron(mask, np.ones((2, 2), bool))
    np.testing.assert_allclose(chunk.latents_TCHW[..., cells], whole.detach().numpy()[..., cells], atol=1e-5)


def test_chosen_tiles_of_a_source_that_was_never_seen_are_those_of_the_whole(codec: PocketCodec) -> None:
    frames, mask = torch.rand(8, 3, 128, 192) * 2 - 1, np.zeros((4, 6), bool)
    mask[1, 0:2] = True
    tiles = Tiles.of(mask)
    with torch.no_grad():
        column = codec.encode_tiles(CodecMemory(), frames, tiles)
        torch.testing.assert_close(column, tiles.gather(codec.encode(frames[None])[0]))


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        ("regions_invalid", {"regions": 1.5}),
        ("regions_invalid", {"regions": float("nan")}),
        ("regions_invalid", {"regions": "fast"}),
        ("paint_invalid", {"paint": "01"}),
        ("paint_invalid", {"paint": "2" * 24}),
        ("paint_invalid", {"paint": "0" * 24}),
        ("paint_invalid", {"paint": 7}),
    ],
)
def test_a_wrong_dial_or_mask_is_refused_before_anything_changes(
    wide: Engine, code: str, changes: dict[str, object]
) -> None:
    state = wide.open(7)
    with pytest.raises(PipelineError) as caught:
        wide.step(state, replace(RED, **changes))  # type: ignore[arg-type]
    assert caught.value.code == code
    assert state.index == 0


def test_a_model_without_whole_tiles_computes_all(config: ModelConfig, codec: PocketCodec, text: TextEncoder) -> None:
    shape = replace(config.student, patch_size=(1, 1, 1))
    narrow = Engine(replace(config, width=80, height=48, student=shape), codec, text, Student(shape).eval())
    assert narrow.config.tiles is None
    state = narrow.open(7)
    for _ in range(SETTLE + 2):
        assert narrow.step(state, replace(RED, paint="1")).active_HW is None


def test_chosen_tiles_decode_and_encode_as_the_whole_does_where_nothing_else_changed(
    codec: PocketCodec, config: ModelConfig
) -> None:
    """The dense twin: with every neighbour as it was, a tile's pictures and latents are those of the whole."""
    mask = np.zeros((2, 6), bool)
    mask[0, 1], mask[1, 4] = True, True
    tiles = Tiles.of(mask)
    still = torch.randn(1, 4, 4, 12, generator=torch.Generator().manual_seed(1)).expand(2, -1, -1, -1)
    frames = torch.rand(1, 3, 64, 192, generator=torch.Generator().manual_seed(2)).expand(8, -1, -1, -1) * 2 - 1
    memory, plain = CodecMemory(), CodecMemory()
    for _ in range(2):
        assert torch.equal(codec.decode_tiles(memory, still, None), codec.decode_push(plain, still))
    whole = codec.decode_push(plain, still)
    for _ in range(2):
        torch.testing.assert_close(codec.decode_tiles(memory, still, tiles), tiles.gather(whole), atol=1e-5, rtol=1e-5)
    eyes = CodecMemory()
    dense = codec.encode(frames[None])[0]
    assert torch.equal(codec.encode_tiles(eyes, frames, None), dense)
    torch.testing.assert_close(codec.encode_tiles(eyes, frames, tiles), tiles.gather(dense), atol=1e-5, rtol=1e-5)


def test_a_change_with_its_halo_decodes_as_the_whole_does(codec: PocketCodec) -> None:
    """Over chunks that follow each other; the halo here is all that the layers reach, so that nothing is left out."""
    generator = torch.Generator().manual_seed(1)
    first = torch.randn(1, 4, 4, 48, generator=generator).expand(2, -1, -1, -1)
    mask = np.zeros((2, 24), bool)
    mask[:, :10] = True
    tiles, memory, plain = Tiles.of(mask), CodecMemory(), CodecMemory()
    codec.decode_tiles(memory, first, None)
    codec.decode_push(plain, first)
    last = first
    for _ in range(3):
        second = last[-1:].expand(2, -1, -1, -1).clone()
        second[..., :4] = torch.randn(2, 4, 4, 4, generator=generator)
        ours, theirs = codec.decode_tiles(memory, second, tiles), codec.decode_push(plain, second)
        torch.testing.assert_close(ours, tiles.gather(theirs), atol=1e-5, rtol=1e-5)
        last = second


def test_layers_see_a_tile_that_is_held_again_as_its_newest_frame(codec: PocketCodec) -> None:
    moving, left = np.zeros((2, 2, 24), bool)
    moving[:, :8] = left[:, 4:8] = True
    memory = CodecMemory()
    codec.decode_tiles(memory, torch.zeros(2, 4, 4, 48), None)
    for mask in (moving, left):
        codec.decode_tiles(memory, torch.randn(2, 4, 4, 48, generator=torch.Generator().manual_seed(1)), Tiles.of(mask))
    for seen in memory.layers.maps:
        cells = (seen.shape[2] - 2) // 24
        held, computed = seen[:, 1:-1, 1 : 1 + 4 * cells], seen[:, 1:-1, 1 + 4 * cells : 1 + 8 * cells]
        assert torch.equal(held[0], held[1])
        assert not torch.equal(computed[0], computed[1])
