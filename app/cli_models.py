"""`stillstream models`: the table of families, and what is here of it. A part of `app.cli`."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from app import licences
from app import shelf as shelves
from app.errors import AppError
from app.shelf import Shelf
from pipeline.bases import BASES
from pipeline.config import SWAP, StudentConfig, WanModel, load_config
from pipeline.downloads import PARTS
from pipeline.errors import PipelineError
from pipeline.family import WAN_SIZE, Family
from pipeline.layout import RULE, read_transformer_shape, transformer_in
from pipeline.memory import Setup, amount, choose, parameters, ways
from pipeline.models import FAMILIES, download, family
from pipeline.own import Own, own, own_name, rule_of

models = typer.Typer(name="models", no_args_is_help=True, help="Models: what there is, what it needs, what is here.")
out = Console()

POCKET_SIZE = (320, 192)
_ON_WAN = ", ".join(key for key, base in BASES.items() if base.parts)

Name = Annotated[str, typer.Argument(help="A model of `stillstream models list`.")]
NameOrFolder = Annotated[str, typer.Argument(help="A model of `stillstream models list`, or a folder of your own.")]
HubCache = Annotated[
    Path | None, typer.Option(help="The hub's cache; by default where its own tools have it.", envvar="HF_HUB_CACHE")
]
Folders = tuple[Path | None, Path | None]  # the hub's cache and that of converted models; None: the usual ones
Bits = Annotated[
    int | None,
    typer.Option(help="Of the layers of a Wan student: 16, or 8 for about half the room.", callback=lambda b: _bits(b)),
]
TextBits = Annotated[
    int | None,
    typer.Option(
        help="Of the weights of Wan's text encoder: 16, or 8 for about half the room.", callback=lambda b: _bits(b)
    ),
]
TextDevice = Annotated[
    str | None,
    typer.Option(
        help="Where Wan's text encoder is: auto (the GPU if all fits there, else the CPU), cpu, swap (in the machine's "
        "memory, and on the GPU layer by layer while it reads), or a device, as cuda:1."
    ),
]
AcceptLicence = Annotated[
    bool, typer.Option("--accept-licence", help="I have read the licence and keep to it. Remembered.")
]
Like = Annotated[
    str | None, typer.Option(help="The family that a student of your own is run as, where its folder does not say.")
]
Models = Annotated[
    Path | None,
    typer.Option(
        "--models-folder", help="Where converted models stand; ~/.cache/stillstream.", envvar="STILLSTREAM_MODELS"
    ),
]


@models.command(name="list")
def list_(hub_cache: HubCache = None, models_folder: Models = None) -> None:
    """All families that Stillstream knows, and the folders of your own that stand beside them."""
    shelf = _shelf(hub_cache, models_folder)
    table = Table(box=None, pad_edge=False)
    for heading in ("name", "weights", "steps", "chunk", "sink + window", "commercial use", "here"):
        table.add_column(heading, no_wrap=heading == "name")
    for row in FAMILIES:
        here = "embedded" if row.layout == "pocket" else "pulled" if shelf.is_pulled(row) else ""
        use = {True: "yes", False: "no", None: "not stated"}[row.commercial]
        table.add_row(*_sizes(row), use, "converted" if shelf.is_converted(row) else here)
    for name, folder in shelf.own.items():
        try:
            row = own(folder)
            table.add_row(*_sizes(row), row.licence, row.source)
        except PipelineError as error:  # `info` says more
            table.add_row(name, "", "", "", "", "", error.code)
    out.print(table, highlight=False)
    parts = ", ".join(f"{part.name} ({'here' if shelf.is_pulled(part) else 'not here'})" for part in PARTS)
    out.print(f"\nBeside every student on Wan: {parts}.", highlight=False)
    out.print(
        f"\n`stillstream models info NAME` says more. Students of your own stand in {shelf.models}, or are named by "
        "their folder.",
        highlight=False,
        soft_wrap=True,
    )


@models.command()
def info(
    name: NameOrFolder,
    size: Annotated[str | None, typer.Option(help="Of the picture; 832x480, the pocket student's 320x192.")] = None,
    device: Annotated[str, typer.Option(help="Where it would run: cpu, cuda, cuda:1.")] = "cpu",
    bits: Bits = None,
    text_bits: TextBits = None,
    text_device: TextDevice = None,
    decoder: Annotated[str, typer.Option(help="Of a Wan model: tiny, or full.")] = "tiny",
    workers: Annotated[int, typer.Option(min=1, help="Worker processes, each with a model of its own.")] = 1,
    like: Like = None,
    hub_cache: HubCache = None,
    models_folder: Models = None,
) -> None:
    """One model: where it comes from, how it runs, what memory it wants, and whether this machine has it."""
    shelf = _shelf(hub_cache, models_folder)
    if (folder := _folder(name, shelf)) and (facts := _facts_of_folder(folder, like)):
        _print(facts)
        return
    row = _row(name, shelf, like)
    width, height = _size(size) if size else _usual_size(row)
    setup = Setup(
        width=width,
        height=height,
        cpu=device == "cpu",
        bits=bits or 16,
        text_bits=text_bits or 16,
        text_on=_text_on(text_device or "auto", device),
        tiny=_is_tiny(decoder),
        tiny_encodes=shelf.tiny_encodes,
        workers=workers,
    )
    plans, room = ways(row, setup), shelves.room(device, setup.apart)
    wants = plans[0]
    try:
        fits = f"yes, {choose(row, setup, room).title}"
    except PipelineError as error:
        fits = f"no. {error.remedy}"
    placed = "\n".join(f"{each.title}: {each.wants}, {'fits' if each.fits(room) else 'too much'}" for each in plans)
    steps = ", ".join(map(str, row.steps)) + (f"; the first chunk {len(row.first_steps)}" if row.first_steps else "")
    facts = {
        "what": f"{row.title}, on {BASES[row.base].title}: {parameters(row.shape) / 1e6:,.0f} million weights",
        "from": _place(row),
        "licence": licences.terms(row),
        "steps": f"{'any number, such as ' if row.any_steps else ''}{steps}; shift {row.shift:g}",
        "chunk": f"{row.chunk} latent frames, "
        + (f"the first {row.first_chunk}, " if row.first_chunk else "")
        + (f"{row.coarse} of the past in larger patches, " if row.coarse else "")
        + f"a sink of {row.sink} and a window of {row.window}"
        + ("" if row.sink_keeps == 1 else f"; the sink keeps {row.sink_keeps:g} of itself when a frame leaves"),
        "positions": "counted from the stream's start"
        if row.positions == "stream"
        else "counted from the remembered past",
        "cache pass": "on all of the window, for each chunk"
        if row.rewrites
        else "a pass of its own"
        if row.clean_pass
        else "none of its own: the last step writes",
        "over a video": "less strength where it moves fast" if row.motion_aware else "the strength that is asked for",
        "remark": row.remark or "none",
        "not verified": ", ".join(row.unverified) or "nothing",
        "source": row.source,
        "here": "converted" if shelf.is_converted(row) else "pulled" if shelf.is_pulled(row) else "no",
        "memory": f"{wants.wants} at {width}x{height}, decoder {decoder}, workers {workers}; of one: "
        f"student {amount(wants.student)}, past {amount(wants.past)}, passes about {amount(wants.work)}, "
        f"codec {amount(wants.codec)}, text encoder {amount(wants.text)}",
        "free": str(room),
        "ways": placed,
        "fits now": fits,
    }
    _print(facts)


@models.command()
def pull(
    name: Name,
    accept_licence: AcceptLicence = False,
    offline: Annotated[bool, typer.Option("--offline", help="Only check what is here already.")] = False,
    hub_cache: HubCache = None,
    models_folder: Models = None,
) -> None:
    """Fetch a model's files from the hub, with progress, and check their hashes.

    With a student on Wan come the text encoder, the autoencoder and the tiny one, which all such students share.
    Whole files are not fetched again; one that was not finished goes on with the next pull where it stopped.
    """
    row, shelf = download(name), _shelf(hub_cache, models_folder)
    if accept_licence:
        licences.accept(shelf.licences, shelves.whole(row))
    licences.require(shelf.licences, shelves.whole(row))  # of all, before the first is fetched
    for each in shelves.whole(row):
        paths = shelves.pull(shelf, each, offline=offline)
        if not paths:
            out.print(f"{row.title} is embedded; there is nothing to fetch.", highlight=False)
            return
        out.print(
            f"{each.title}: {len(paths)} files, whole, hashes right. Licence: {licences.terms(each)}.", highlight=False
        )
    if isinstance(row, Family) and row.layout == "wan":
        out.print(f"Next: stillstream models convert {row.name}", highlight=False)


@models.command()
def convert(
    name: Annotated[str, typer.Argument(help="A model that was pulled, or a checkpoint: a .pt or .safetensors file.")],
    base: Annotated[str | None, typer.Option(help=f"Of a checkpoint of your own: {_ON_WAN}.")] = None,
    like: Annotated[str | None, typer.Option(help="Instead of --base: the family that it will be run as.")] = None,
    entry: Annotated[str | None, typer.Option(help="Where in it the weights are, as generator_ema.")] = None,
    sha256: Annotated[str | None, typer.Option(help="What its hash has to be.")] = None,
    lora: Annotated[Path | None, typer.Option(help="Low-rank weights to merge into it.")] = None,
    strength: Annotated[float, typer.Option(help="How strongly.")] = 1.0,
    to: Annotated[Path | None, typer.Option("--out", help="The folder to write, for a checkpoint of your own.")] = None,
    half: Annotated[bool, typer.Option("--half", help="Store in bfloat16: half of the room.")] = False,
    accept_licence: AcceptLicence = False,
    hub_cache: HubCache = None,
    models_folder: Models = None,
) -> None:
    """Make a folder in diffusers' layout, once: safetensors with hashes. Pickles are read as numbers only."""
    shelf = _shelf(hub_cache, models_folder)
    if not math.isfinite(strength):
        raise AppError("setting_invalid", f"The strength {strength} is no number.", "Correct --strength.")
    if not Path(name).is_file():
        if name not in {row.name for row in FAMILIES}:
            raise AppError(
                "model_unknown",
                f"There is no file {name}, and no model of that name.",
                "Name a checkpoint that is there.",
            )
        of_own = {"--base": base, "--like": like, "--entry": entry, "--sha256": sha256, "--lora": lora, "--out": to}
        if told := [flag for flag, value in of_own.items() if value is not None] + ["--strength"] * (strength != 1):
            raise AppError("setting_invalid", f"{name} is converted as its row says.", f"Leave {', '.join(told)} out.")
        row = family(name)
        if accept_licence:
            licences.accept(shelf.licences, [row])
        made, folder = shelves.convert(shelf, row, half=half), shelf.converted(row)
    else:
        rule = rule_of(family(like), own_name(to)) if like and to else None
        base = base or (family(like).base if like else None)
        if base not in BASES or to is None:
            raise AppError(
                "setting_invalid",
                f"{name} is a checkpoint of your own, so --out and --base or --like have to be named.",
                f"Choose --base from {_ON_WAN}.",
            )
        if like and base != family(like).base:
            raise AppError("setting_invalid", f"{like} is not on {base}.", "Leave --base out: --like tells it.")
        import torch

        from pipeline.convert import convert as convert_file

        folder, dtype = to, torch.bfloat16 if half else None
        made = convert_file(
            Path(name),
            to,
            BASES[base].shape,
            entry=entry,
            sha256=sha256,
            dtype=dtype,
            lora=lora,
            strength=strength,
            rule=rule,
        )
    out.print(f"{'Made' if made else 'Made before from the same file:'} {folder}", highlight=False, soft_wrap=True)
    if to is not None:
        hint = "" if (folder / RULE).is_file() else " --like FAMILY"
        out.print(f"Next: stillstream serve --model {folder}{hint}", highlight=False, soft_wrap=True)


@models.command()
def verify(name: NameOrFolder, hub_cache: HubCache = None, models_folder: Models = None) -> None:
    """Compare files with their hashes: those of the hub, and those that were written when they were converted."""
    shelf = _shelf(hub_cache, models_folder)
    if folder := _folder(name, shelf):
        shelves.verify(transformer_in(folder) or folder)
        out.print(f"{name}: whole, hashes right.", highlight=False)
        return
    row = download(name)
    if not isinstance(row, Family):
        for path in shelves.check_pulled(shelf, row):
            out.print(f"{path}: hash right.", highlight=False, soft_wrap=True)
        return
    if row.layout == "pocket":
        from pipeline.weights import pocket_folder

        shelves.verify(pocket_folder())
        out.print("pocket: whole, hashes right.", highlight=False)
        return
    pulled = shelf.pulled(row)
    if shelf.is_converted(row):
        shelves.verify(shelf.converted(row))
        out.print(f"{shelf.converted(row)}: whole, hashes right.", highlight=False, soft_wrap=True)
    if pulled or not shelf.is_converted(row):
        for part in shelves.whole(row):
            for path in shelves.check_pulled(shelf, part):
                out.print(f"{path}: hash right.", highlight=False, soft_wrap=True)


@models.command()
def remove(
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    hub_cache: HubCache = None,
    models_folder: Models = None,
) -> None:
    """Take away what was fetched and converted of a model; parts that others share go by their own names."""
    shelf = _shelf(hub_cache, models_folder)
    folder = shelf.own.get(name)
    if folder is None and Path(name).is_dir():
        raise AppError(
            "model_unknown", f"{name} is not in {shelf.models}.", "Remove a folder that stands elsewhere yourself."
        )
    row = None if folder else download(name)
    if not yes and not typer.confirm(f"Remove all files of {row.title if row else folder}?"):
        return
    freed = shelves.remove(shelf, row) if row else shelves.remove_folder(shelf.models / name)
    out.print(f"{amount(freed)} are free again.", highlight=False)


def named(
    model: Path | None,
    device: str,
    *,
    like: str | None = None,
    size: str | None = None,
    decoder: str = "tiny",
    bits: int = 16,
    text_bits: int = 16,
    text_device: str = "auto",
    accept_licence: bool = False,
    loras: Sequence[Path] = (),
    workers: int = 1,
    folders: Folders = (None, None),
) -> Path | WanModel | None:
    """What --model means: a folder, or a name of the table or the shelf; None is the embedded student.

    like: the family that a folder is run as, which does not say so itself. accept_licence: whether its licence, where
    it wants a yes, is hereby accepted.
    Raises PipelineError: those of `own`, `memory_short`, `size_invalid`; AppError: those of `shelf.serving`,
    `setting_invalid`.
    """
    shelf = _shelf(*folders)
    row = family("pocket") if model is None else _row(str(model), shelf, like)
    if like is not None and not (isinstance(row, Own) and row.layout == "wan" and not (row.folder / RULE).is_file()):
        raise AppError("setting_invalid", f"{row.name} says itself how it is run.", "Leave --like out.")
    if row.layout == "pocket":
        if size is not None:
            raise AppError("setting_invalid", "This model has one size of its own.", "Leave --size out.")
        return row.folder if isinstance(row, Own) else None
    width, height = _size(size) if size else _usual_size(row)
    setup = Setup(
        width=width,
        height=height,
        cpu=device == "cpu",
        bits=bits,
        text_bits=text_bits,
        text_on=_text_on(text_device, device),
        tiny=_is_tiny(decoder),
        tiny_encodes=shelf.tiny_encodes,
        loras=tuple(path.stat().st_size for path in loras if path.is_file()),
        workers=workers,
    )
    if row.layout == "wan":
        setup = choose(row, setup, shelves.room(device, setup.apart)).setup
    if accept_licence:
        licences.accept(shelf.licences, shelves.drawing(row, tiny=setup.tiny))
    return shelves.serving(shelf, row, setup, text_device=device if setup.text_on == "beside" else setup.text_on)


def told_licence(model: Path | WanModel | None) -> str | None:
    """The licence of a model of the table, and of those parts of it that want a yes of their own; None: it has none.

    That of a student of one's own is not known here.
    """
    if not isinstance(model, WanModel):
        return None
    parts = [part for part in shelves.parts(tiny=model.tiny is not None) if part.needs_consent]
    told = parts if model.family is None else [family(model.family), *parts]
    if not told:
        return None
    return f"Licence: {'; '.join(f'{each.title} ({licences.terms(each)})' for each in told)}."


def _folder(name: str, shelf: Shelf) -> Path | None:
    """The folder of one's own that a name means: a path, or one on the shelf."""
    return Path(name) if Path(name).exists() else shelf.own.get(name)


def _row(name: str, shelf: Shelf, like: str | None) -> Family:
    """What a name means. Raises AppError (`model_unknown`), PipelineError: those of `own` and `family`."""
    if folder := _folder(name, shelf):
        return own(folder, family(like) if like else None)
    if name not in {row.name for row in FAMILIES}:
        raise AppError(
            "model_unknown",
            f"There is no folder {name}, and no model of that name.",
            "`stillstream models list` names those that there are.",
        )
    return family(name)


def _usual_size(row: Family) -> tuple[int, int]:
    """Width and height."""
    if isinstance(row, Own):
        return row.told.width, row.told.height
    return POCKET_SIZE if row.layout == "pocket" else WAN_SIZE


def _sizes(row: Family) -> tuple[str, ...]:
    """A row's first columns in the list."""
    weights = parameters(row.shape)
    return (
        row.name,
        f"{weights / 1e9:.2f} B" if weights >= 1e8 else f"{weights / 1e6:.1f} M",
        "any" if row.any_steps else str(len(row.steps)),
        str(row.chunk),
        row.past,
    )


def _place(row: Family) -> str:
    if isinstance(row, Own):
        return str(row.folder)
    return f"{row.repo}: {', '.join(row.files)}" if row.repo else "embedded in Stillstream"


def _facts_of_folder(folder: Path, like: str | None) -> dict[str, str] | None:
    """Of a model folder, or of a transformer that does not say how it is run; None: it does, or it is told."""
    place = transformer_in(folder)
    if place is None:
        config = load_config(folder / "config.json")
        shape, name = config.student, f"{config.name}: {config.width}x{config.height} at {config.fps} fps"
        steps = f"{', '.join(map(str, config.sampler.steps))}; shift {config.sampler.shift:g}"
        past = f"{config.chunk} latent frames, a sink of {config.cache.sink} and a window of {config.cache.window}"
        facts = {"what": name, "steps": steps, "chunk": past}
    elif like or (place / RULE).is_file():
        return None
    else:
        shape, facts = StudentConfig(**read_transformer_shape(place)), {"what": "a transformer in diffusers' layout"}
        facts["steps"] = "it does not say; add --like and the family that it is run as"
    return facts | {"weights": f"{parameters(shape) / 1e6:,.1f} million", "licence": "yours to know"}


def _print(facts: dict[str, str]) -> None:
    table = Table.grid(padding=(0, 2))
    for name, fact in facts.items():
        table.add_row(name, escape(fact))
    out.print(table, highlight=False)


def _bits(bits: int | None) -> int | None:
    if bits in (None, 8, 16):
        return bits
    raise AppError("setting_invalid", f"Weights of {bits} bits are not known.", "Choose 16 or 8.")


def _text_on(text_device: str, device: str) -> str:
    """What `Setup` calls it."""
    if text_device in ("auto", "cpu", SWAP):
        return text_device
    first = {"cuda": "cuda:0"}
    return "beside" if first.get(text_device, text_device) == first.get(device, device) else text_device


def _is_tiny(decoder: str) -> bool:
    if decoder in ("tiny", "full"):
        return decoder == "tiny"
    raise AppError("setting_invalid", f"There is no decoder {decoder!r}.", "Choose tiny or full.")


def _size(text: str) -> tuple[int, int]:
    if found := re.fullmatch(r"(\d{1,5})x(\d{1,5})", text):
        return int(found[1]), int(found[2])
    raise AppError("setting_invalid", f"The size {text!r} is not width x height.", "Write it as 832x480.")


def _shelf(hub_cache: Path | None, models_folder: Path | None) -> Shelf:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Shelf(hub_cache or Path(HF_HUB_CACHE), models_folder or Path("~/.cache/stillstream/models").expanduser())
