"""Wan's text encoder reads prompts as transformers does in a padded batch, and refuses what it is not."""

import json
import re
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode

from pipeline.errors import PipelineError
from pipeline.narrow import Copied, EightBitLinear
from pipeline.umt5 import Umt5, cleaned, fingerprint, load_umt5
from tests.app.tiny_wan import write_text

PROMPT = "a red ball bounces in the park"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_text(tmp_path)
    return tmp_path


def refused(folder: Path) -> PipelineError:
    with pytest.raises(PipelineError) as error:
        load_umt5(folder / "text_encoder", folder / "tokenizer")
    assert "\n" not in error.value.message
    return error.value


def theirs(folder: Path, ids: list[int], dtype: torch.dtype) -> torch.Tensor:
    """What transformers makes of tokens in a padded batch, in single precision, of weights rounded to a type."""
    from transformers import UMT5Config, UMT5EncoderModel

    network = UMT5EncoderModel(UMT5Config.from_dict(json.loads((folder / "text_encoder/config.json").read_text())))
    paths = (folder / "text_encoder").glob("*.safetensors")
    values = {name: value.to(dtype).float() for path in paths for name, value in load_file(path).items()}
    network.load_state_dict(values | {"encoder.embed_tokens.weight": values["shared.weight"]})
    padded = torch.tensor([ids + [0] * (20 - len(ids))])
    with torch.no_grad():
        return network.eval()(input_ids=padded, attention_mask=(padded > 0).long()).last_hidden_state[0][: len(ids)]


def test_a_prompt_alone_is_what_transformers_makes_of_it_in_padding(folder: Path) -> None:
    reader = load_umt5(folder / "text_encoder", folder / "tokenizer")
    ids = [*reader.tokenizer.encode(PROMPT).ids]
    assert ids[-1] == 1  # Wan's prompts end with </s>
    torch.testing.assert_close(reader.read(PROMPT), theirs(folder, ids, torch.bfloat16), atol=1e-5, rtol=1e-4)


def test_a_file_in_single_precision_is_held_in_half_and_reads_nearly_as_before(folder: Path) -> None:
    stored = {value.dtype for path in folder.glob("*/*.safetensors") for value in load_file(path).values()}
    assert stored == {torch.float32}
    reader = load_umt5(folder / "text_encoder", folder / "tokenizer")
    assert {value.dtype for value in reader.network.state_dict().values()} == {torch.bfloat16}
    made = reader.read(PROMPT)
    exact = theirs(folder, [*reader.tokenizer.encode(PROMPT).ids], torch.float32)
    assert made.dtype == torch.float32
    assert torch.cosine_similarity(made, exact, dim=-1).min() > 0.9999
    assert {value.dtype for value in reader.network.state_dict().values()} == {torch.bfloat16}


LOAD = """
import re, sys
from pathlib import Path
import psutil
from pipeline.umt5 import load_umt5
small, large = map(Path, sys.argv[1:])
load_umt5(small / "text_encoder", small / "tokenizer")  # imports
before = psutil.Process().memory_info().rss
load_umt5(large / "text_encoder", large / "tokenizer")
# Not getrusage's peak: that one begins with what the parent held.
peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
print(peak * 1024 - before)
"""


def test_a_file_in_single_precision_is_never_whole_in_memory(folder: Path, tmp_path: Path) -> None:
    from transformers import UMT5Config, UMT5EncoderModel

    large, layers = tmp_path / "large", 8
    shutil.copytree(folder / "tokenizer", large / "tokenizer")
    (large / "text_encoder").mkdir()
    told = json.loads((folder / "text_encoder/config.json").read_text()) | {"d_ff": 2**17, "num_layers": layers}
    (large / "text_encoder/config.json").write_text(json.dumps(told))
    with torch.device("meta"):
        shapes = {
            name: value.shape for name, value in UMT5EncoderModel(UMT5Config.from_dict(told)).state_dict().items()
        }
    for part in range(layers):
        names = [name for name in shapes if int((re.findall(r"block\.(\d+)", name) or [0])[0]) == part]
        save_file({name: torch.zeros(shapes[name]) for name in names}, large / f"text_encoder/model-{part}.safetensors")
    whole = sum(path.stat().st_size for path in large.glob("*/*.safetensors"))
    words = [sys.executable, "-c", LOAD, str(folder), str(large)]
    ran = subprocess.run(words, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    # Half of it is held, and one file is looked at beside.
    assert whole / 2 <= int(ran.stdout) < 0.8 * whole


def test_prompts_are_cleaned_as_in_training_and_long_ones_cut(folder: Path) -> None:
    assert cleaned("  a &amp;amp; b\n\tc ") == "a & b c"
    reader = load_umt5(folder / "text_encoder", folder / "tokenizer")
    assert reader.read("red " * 900).shape == (512, 32)
    assert reader.read("").shape == (1, 32)


def test_eight_bits_are_close_to_sixteen(folder: Path) -> None:
    full, small = (load_umt5(folder / "text_encoder", folder / "tokenizer", bits=bits) for bits in (16, 8))
    assert sum(isinstance(layer, EightBitLinear) for layer in small.network.modules()) == 2 * 7
    likeness = torch.cosine_similarity(full.read(PROMPT), small.read(PROMPT), dim=-1)
    assert 0.995 < likeness.min() < 1


class PretendGpu(TorchFunctionMode):
    """The CPU goes by the name of cuda, and what is copied there is counted while it lives."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.most = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if func is torch.device:
            return func(*args, **named)
        cpu = [torch.device("cpu") if self._means_us(value) else value for value in args]
        made = func(*cpu, **{name: "cpu" if self._means_us(value) else value for name, value in named.items()})
        if func is torch.Tensor.to and any(map(self._means_us, (*args[1:], *named.values()))):
            made = made.clone()
            self.held += made.nbytes
            self.most = max(self.most, self.held)
            weakref.finalize(made, self._gone, made.nbytes)
        return made

    def _gone(self, count: int) -> None:
        self.held -= count

    @staticmethod
    def _means_us(value: Any) -> bool:
        return isinstance(value, str | torch.device) and str(value) == "cuda"


@pytest.mark.parametrize("bits", [16, 8])
def test_swapped_it_reads_the_same_to_the_bit_and_has_one_layer_on_the_gpu_at_a_time(folder: Path, bits: int) -> None:
    def load(swapped: bool) -> Umt5:
        return load_umt5(folder / "text_encoder", folder / "tokenizer", device="cuda", bits=bits, swapped=swapped)

    with PretendGpu() as gpu:
        resident, swapped = load(swapped=False), load(swapped=True)
        expected = resident.read(PROMPT)
        before, gpu.most = gpu.held, gpu.held
        assert torch.equal(swapped.read(PROMPT), expected)
    assert gpu.held == before
    layers = [layer for layer in swapped.network.modules() if isinstance(layer, Copied)]
    assert len(layers) == 2 * 2 + 1
    widest = max(sum(value.nbytes for value in (*layer.parameters(), *layer.buffers())) for layer in layers)
    assert widest <= gpu.most - before <= widest + expected.nbytes


def test_swapped_layers_leave_nothing_on_the_wrong_device(folder: Path) -> None:
    network = load_umt5(folder / "text_encoder", folder / "tokenizer", device="meta", swapped=True).network
    made = network(inputs_embeds=torch.empty(1, 5, 32, dtype=torch.bfloat16, device="meta"))  # refuses a mixture
    assert made.last_hidden_state.device.type == "meta"
    assert {value.device.type for value in network.state_dict().values()} == {"cpu"}


def test_swapped_on_a_cpu_it_is_what_it_is_there_anyway(folder: Path) -> None:
    here, swapped = (load_umt5(folder / "text_encoder", folder / "tokenizer", swapped=each) for each in (False, True))
    assert torch.equal(here.read(PROMPT), swapped.read(PROMPT))


def test_the_fingerprint_changes_with_weights_and_bits(folder: Path) -> None:
    def seen(bits: int = 16) -> str:
        return fingerprint(folder / "text_encoder", folder / "tokenizer", bits)

    before = seen()
    assert before == seen() and before != seen(8)
    path = folder / "text_encoder" / "model-00001-of-00002.safetensors"
    save_file({name: value + 1 for name, value in load_file(path).items()}, path)
    assert seen() != before


def test_each_wrong_folder_is_refused_in_one_sentence(folder: Path) -> None:
    encoder, first = folder / "text_encoder", folder / "text_encoder" / "model-00001-of-00002.safetensors"
    whole, values = first.read_bytes(), load_file(first)
    save_file(dict(list(values.items())[1:]), first)
    assert refused(folder).code == "text_encoder_mismatch"
    assert "1 is missing" in refused(folder).message
    first.write_bytes(whole[:1000])
    assert refused(folder).code == "weights_damaged"
    first.unlink()
    assert refused(folder).code == "weights_missing"
    told = json.loads((encoder / "config.json").read_text())
    (encoder / "config.json").write_text(json.dumps(told | {"model_type": "bert"}))
    assert "a bert, not a umt5" in refused(folder).message
    (encoder / "config.json").write_text(json.dumps(told))
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    assert refused(folder).code == "weights_damaged"
    (folder / "tokenizer" / "tokenizer.json").unlink()
    assert refused(folder).code == "weights_missing"
