"""A Wan student and all that stands beside it, tiny and random, in the layout of the real repos on the hub.

Run as a program it is `stillstream` with a table whose Wan is so small.
"""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

from pipeline.bases import BASES, CodecWeights, TextWeights
from pipeline.config import StudentConfig
from pipeline.downloads import WAN_TEXT, WAN_TINY
from pipeline.family import Family
from pipeline.models import family

SHAPE = StudentConfig(
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=16,
    out_channels=16,
    text_dim=32,
    freq_dim=32,
    ffn_dim=48,
    num_layers=2,
)
SMALL = ("wan-1.3b", "anyflow-1.3b")
ROW = family("self-forcing")
WORDS = ("a", "red", "blue", "ball", "bounces", "in", "the", "park")
Files = dict[str, bytes]


def shrink_table() -> None:
    """Wan 1.3B is this from now on, and AnyFlow's 1.3B this with what it has more."""
    for name in SMALL:
        far = BASES[name].shape
        more = {key: getattr(far, key) for key in ("compressed_patch_size", "full_chunk_limit", "gate_value")}
        shape = replace(SHAPE, **more, deltatime_type=far.deltatime_type)
        BASES[name] = replace(BASES[name], shape=shape, codec=CodecWeights(0), text=TextWeights())


def repos(row: Family = ROW) -> dict[str, Files]:
    """All repos that a student of this family needs; those of other families share them."""
    assert row.repo is not None and WAN_TEXT.repo is not None and WAN_TINY.repo is not None
    with tempfile.TemporaryDirectory() as folder:
        write_text(Path(folder))
        write_vae(Path(folder) / "vae")
        wan = {path.relative_to(folder).as_posix(): path.read_bytes() for path in Path(folder).rglob("*.*")}
    return {
        row.repo: published(row),
        WAN_TEXT.repo: wan | {"transformer/diffusion_pytorch_model.safetensors": b"Nobody asks for this."},
        WAN_TINY.repo: {WAN_TINY.files[0]: tiny_codec(), "taew2_2.safetensors": b"Nor for this."},
    }


def published(row: Family) -> Files:
    """A family's own files: one checkpoint, or a transformer's folder."""
    if not row.files[0].endswith("/*"):
        return {row.files[0]: checkpoint(row)}
    import torch

    from pipeline.student import Student
    from tests.pipeline.conftest import stir
    from tests.pipeline.published import publish_folder

    torch.manual_seed(3)
    student = Student(row.shape).requires_grad_(False)
    stir(student, 0.2)
    with tempfile.TemporaryDirectory() as folder:
        place = publish_folder(student, Path(folder) / row.files[0].removesuffix("/*"))
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in place.iterdir()}


def checkpoint(row: Family = ROW) -> bytes:
    import torch

    from pipeline.student import Student
    from tests.pipeline.conftest import stir
    from tests.pipeline.published import publish

    torch.manual_seed(3)
    student = Student(SHAPE).requires_grad_(False)
    stir(student, 0.2)
    with tempfile.TemporaryDirectory() as folder:
        return publish(row, student.model.state_dict(), Path(folder)).read_bytes()


def write_text(folder: Path) -> None:
    """The folders text_encoder, in two pieces as the real one is in several, and tokenizer."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(4)
    config = UMT5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0)
    values = {name: torch.randn_like(value) / 5 for name, value in UMT5EncoderModel(config).state_dict().items()}
    del values["encoder.embed_tokens.weight"]  # the same as `shared`, and stored once
    encoder = folder / "text_encoder"
    encoder.mkdir(parents=True)
    (encoder / "config.json").write_text(json.dumps(config.to_dict()))
    names = sorted(values)
    pieces = {f"model-0000{part + 1}-of-00002.safetensors": names[part::2] for part in range(2)}
    for file, held in pieces.items():
        save_file({name: values[name].contiguous() for name in held}, encoder / file)
    where = {name: file for file, held in pieces.items() for name in held}
    (encoder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))

    ids = {word: index for index, word in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
    tokenizer = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    (folder / "tokenizer").mkdir()
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))


def write_vae(folder: Path) -> None:
    import torch
    from diffusers import AutoencoderKLWan

    torch.manual_seed(5)
    AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1).save_pretrained(folder)


def tiny_codec(*, encodes: bool = True) -> bytes:
    """Of the real size."""
    from safetensors.torch import save

    from tests.pipeline.published import taehv

    return save({name: value for name, value in taehv().items() if encodes or name.startswith("decoder.")})


if __name__ == "__main__":
    from app.cli import main

    shrink_table()
    main()
