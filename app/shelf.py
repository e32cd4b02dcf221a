"""Models on this machine: fetched from the hub, checked, converted, and taken away again.

What is fetched stays in the hub's own cache, where other programs find it too; what is converted stands on the shelf,
one folder a family, and so do models of one's own. Imports torch only to convert. Knows no command line and no engine.
"""

import errno
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import psutil
from safetensors import SafetensorError, safe_open

from app import licences
from app.errors import AppError, memory_short
from app.unfinished import ENDING, Unfinished, go_on, has_hash
from pipeline.bases import BASES
from pipeline.config import WanModel
from pipeline.downloads import PARTS, WAN_TEXT, WAN_TINY, WAN_VAE, Download
from pipeline.errors import PipelineError, ran_full
from pipeline.family import Family
from pipeline.layout import RECORD, recorded
from pipeline.memory import Room, Setup, amount
from pipeline.models import FAMILIES
from pipeline.own import Own

_UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}


@dataclass(frozen=True)
class Shelf:
    """hub: the hub's cache. models: where converted ones stand."""

    hub: Path
    models: Path

    def repo(self, row: Download) -> Path:
        assert row.repo is not None, f"{row.name} is on no hub"
        return self.hub / f"models--{row.repo.replace('/', '--')}"

    def unfinished(self, row: Download) -> Unfinished:
        """What there is of files that were not fetched to their end."""
        return Unfinished(self.repo(row), row.name)

    def converted(self, row: Family) -> Path:
        return row.folder if isinstance(row, Own) else self.models / row.name / "transformer"

    def is_converted(self, row: Family) -> bool:
        return isinstance(row, Own) or (self.converted(row) / RECORD).is_file()

    @property
    def own(self) -> dict[str, Path]:
        """Folders of one's own by their names, which are none of the table."""
        taken = {row.name for row in (*FAMILIES, *PARTS)}
        folders = sorted(self.models.iterdir()) if self.models.is_dir() else []
        return {
            path.name: path
            for path in folders
            if path.is_dir() and not path.name.startswith(".") and path.name not in taken
        }

    @property
    def tiny_encodes(self) -> bool:
        """Whether the tiny codec's file has an encoder; of one that is not here, what its row says."""
        file = self.pulled(WAN_TINY).get(WAN_TINY.files[0])
        if file is None:
            return True
        try:
            with safe_open(file, "np") as opened:
                return any(name.startswith("encoder.") for name in opened.keys())  # noqa: SIM118
        except (SafetensorError, OSError):  # whoever loads it says so
            return False

    @property
    def prompts(self) -> Path:
        """Where embeddings of prompts are kept."""
        return self.models.parent / "prompts"

    @property
    def licences(self) -> Path:
        """Which were said yes to."""
        return self.models.parent / "licences.json"

    def pulled(self, row: Download) -> dict[str, Path]:
        """A family's files that are in the hub's cache, by their names in the repo."""
        if row.repo is None:
            return {}
        snapshots = self.repo(row) / "snapshots"
        try:
            newest = snapshots / (self.repo(row) / "refs" / "main").read_text().strip()
        except OSError:
            newest = max(snapshots.glob("*"), key=lambda path: path.stat().st_mtime, default=snapshots)
        named = ((path.relative_to(newest).as_posix(), path) for path in sorted(newest.rglob("*")) if path.is_file())
        return {name: path for name, path in named if row.wants(name)}

    def is_pulled(self, row: Download) -> bool:
        held = self.pulled(row)
        return bool(row.files) and all(any(fnmatchcase(name, pattern) for name in held) for pattern in row.files)


def whole(row: Download) -> tuple[Download, ...]:
    """A family and the parts that it cannot be served without, or a part alone."""
    return (row, *BASES[row.base].parts) if isinstance(row, Family) and row.layout == "wan" else (row,)


def parts(*, tiny: bool) -> tuple[Download, ...]:
    """What all students on Wan share. tiny: by the tiny encoder and decoder."""
    return (WAN_TEXT, WAN_VAE, *([WAN_TINY] if tiny else []))


def drawing(row: Family, *, tiny: bool) -> tuple[Download, ...]:
    """A family on Wan and the parts that draw with it."""
    return (row, *parts(tiny=tiny))


def pull(shelf: Shelf, row: Download, *, offline: bool = False, endpoint: str | None = None) -> list[Path]:
    """Fetch a family's files and compare them with the hub's hashes; what does not have its own is dropped.

    One that lay here before is fetched anew at once. offline: only compare what is here, and change nothing.
    Raises AppError: `licence_not_accepted`, `model_not_pulled`, `hub_unreachable`, `hub_refused`, `hub_missing`,
    `disk_full`, `out_unwritable`, `download_damaged`.
    """
    if row.repo is None:
        return []
    licences.require(shelf.licences, [row])
    if offline:
        if not shelf.is_pulled(row):
            raise _not_pulled(shelf, row)
        return list(check_pulled(shelf, row))
    held = shelf.pulled(row).keys()
    _fetch(shelf, row, row.repo, endpoint)
    wrong = _drop_damaged(shelf, row)
    if wrong and wrong <= held:  # they lay here damaged; none of them is fetched a third time
        return pull(shelf, row, endpoint=endpoint)
    if wrong:
        raise _damaged(row, min(wrong), "It was dropped. Pull again: that file begins anew.")
    return list(shelf.pulled(row).values())


def _fetch(shelf: Shelf, row: Download, repo: str, endpoint: str | None) -> None:
    # Half a second that no other command should wait for.
    from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_download, hf_hub_url

    try:
        listed = HfApi(endpoint=endpoint).model_info(repo, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in listed.siblings or [] if row.wants(file.rfilename)}
        missing = [pattern for pattern in row.files if not any(fnmatchcase(name, pattern) for name in sizes)]
        if missing:
            raise AppError(
                "hub_missing", f"{repo} has no {missing[0]}; it may have been renamed.", f"Look at {row.source}."
            )
        urls = {name: hf_hub_url(repo, name, revision=listed.sha, endpoint=endpoint) for name in sizes}
        told = {name: get_hf_file_metadata(url) for name, url in urls.items()}
        unfinished = shelf.unfinished(row)
        unfinished.drop(keep=frozenset(each.etag for each in told.values() if each.etag))
        wanted = sum(size for name, size in sizes.items() if name not in shelf.pulled(row)) - unfinished.size
        shelf.hub.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(shelf.hub).free
        if free < wanted:
            raise _disk_full(shelf.hub, f"{amount(wanted)} are to be fetched, {amount(free)} are free")
        with _quiet("huggingface_hub"):
            # One after the other and in this thread: the hub's own way to fetch many lets Ctrl-C wait for whole files.
            for name, url in urls.items():
                go_on(unfinished, url, told[name])
                hf_hub_download(repo, name, cache_dir=shelf.hub, endpoint=endpoint)
    except AppError:
        raise
    except Exception as error:  # there is no end to what a connection that breaks off raises
        raise _told(error, shelf, row) from error


@contextmanager
def _quiet(library: str) -> Iterator[None]:
    """Its warnings stay away from the terminal, where a sentence of ours says what there is to say."""
    log = logging.getLogger(library)
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def _told(error: Exception, shelf: Shelf, row: Download) -> AppError:
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):
        return AppError(
            "hub_refused",
            f"{row.repo} is given only to those who are logged in and have accepted its terms.",
            f"Accept them at https://huggingface.co/{row.repo}, then run `hf auth login`.",
        )
    if isinstance(error, RepositoryNotFoundError | RevisionNotFoundError):
        return AppError(
            "hub_missing", f"The hub has no {row.repo}, or does not show it to you.", f"Look at {row.source}."
        )
    if ran_full(error):
        return _disk_full(shelf.hub, "the disk ran full, or a quota was reached; the unfinished file was not kept")
    if isinstance(error, OSError) and error.errno in _UNWRITABLE:
        why = (error.strerror or str(error)).lower()
        return AppError(
            "out_unwritable", f"{shelf.hub} cannot be written: {why}.", "Name a --hub-cache that you may write to."
        )
    why = f"it answered {error.response.status_code}" if isinstance(error, HfHubHTTPError) else "no connection"
    return AppError(
        "hub_unreachable",
        f"The hub cannot be reached, or broke off: {why}. What was fetched is kept.",
        "Pull again later, which goes on behind it, or use --offline with what was fetched before.",
    )


def _disk_full(folder: Path, why: str) -> AppError:
    return AppError("disk_full", f"There is no room in {folder}: {why}.", "Make room, or name another --hub-cache.")


def _not_pulled(shelf: Shelf, row: Download) -> AppError:
    return AppError(
        "model_not_pulled",
        f"{row.title} is not whole in {shelf.hub}.",
        f"Run `stillstream models pull {row.name}` with a network.",
    )


def check_pulled(shelf: Shelf, row: Download) -> Iterator[Path]:
    """Each of a family's files, once its hash is that of the hub.

    The hub's cache names each file's content by its hash: SHA-256 of large files, git's of small ones.
    Raises AppError: `model_not_pulled`, `download_damaged`.
    """
    if not shelf.is_pulled(row):
        raise _not_pulled(shelf, row)
    for name, path in shelf.pulled(row).items():
        if _is_damaged(path):
            raise _damaged(row, name, f"Pull again: `stillstream models pull {row.name}` fetches that file anew.")
        yield path


def _is_damaged(path: Path) -> bool:
    content = path.resolve()
    return not has_hash(content, content.name)


def _damaged(row: Download, name: str, remedy: str) -> AppError:
    what = f"{name} of {row.repo} does not have the hash that the hub names it by."
    return AppError("download_damaged", what, remedy)


def _drop_damaged(shelf: Shelf, row: Download) -> set[str]:
    """Take away a family's files that do not have their hash, and every link to them; returns their names.

    A file that only a link of the user's own leads to, outside of the cache, stays.
    """
    wrong = {name: path.resolve() for name, path in shelf.pulled(row).items() if _is_damaged(path)}
    links = [link for link in shelf.repo(row).glob("snapshots/*/**/*") if link.resolve() in wrong.values()]
    try:
        for path in (*links, *wrong.values()):
            if path.is_symlink() or path.is_relative_to(shelf.repo(row).resolve()):
                path.unlink(missing_ok=True)
    except OSError as error:
        raise _told(error, shelf, row) from error
    return set(wrong)


def convert(shelf: Shelf, row: Family, *, half: bool) -> bool:
    """Make a family's folder from what was pulled; False: it was made before.

    Raises AppError: `model_not_pulled`, `model_not_convertible`, `licence_not_accepted`, `download_damaged`;
    PipelineError: see `pipeline.convert.convert`.
    """
    if row.layout != "wan":
        raise AppError("model_not_convertible", f"{row.title} is embedded and ready.", "Choose another model.")
    if not shelf.is_pulled(row):
        raise _not_pulled(shelf, row)
    licences.require(shelf.licences, [row])
    import torch

    from pipeline.convert import convert as convert_file

    files = shelf.pulled(row)
    source = next(path for name, path in files.items() if fnmatchcase(name, row.files[0]))
    named_by = source.resolve().name  # large files are named by their SHA-256, which `convert` reckons anyway
    if row.files[0].endswith("/*"):
        list(check_pulled(shelf, row))  # of a folder `convert` knows no hash to compare with
        source, named_by = source.parent, ""
    try:
        return convert_file(
            source,
            shelf.converted(row),
            row.shape,
            entry=row.weights,
            sha256=named_by if len(named_by) == 64 else None,
            dtype=torch.bfloat16 if half else None,
            lora=files[row.lora] if row.lora else None,
            lora_entry=row.lora_weights,
        )
    except PipelineError:
        list(check_pulled(shelf, row))  # a file that was damaged on its way is told as that
        raise


def verify(folder: Path) -> None:
    """Compare a converted folder or a model folder with its record. Raises PipelineError: see `pipeline.weights`."""
    from pipeline import convert as converted
    from pipeline import weights as model

    (converted if "source" in recorded(folder) else model).verify(folder)


def serving(
    shelf: Shelf,
    row: Family,
    setup: Setup,
    *,
    text_device: str,
) -> WanModel:
    """What the engine loads for a converted family, or a transformer of one's own.

    Raises AppError: `model_not_served`, `model_not_converted`, `model_not_pulled`, `licence_not_accepted`.
    """
    if row.layout != "wan":
        raise AppError("model_not_served", f"{row.title} is none on Wan.", "Choose another model.")
    if not shelf.is_converted(row):
        raise AppError(
            "model_not_converted",
            f"{row.title} is not converted yet.",
            f"Run `stillstream models convert {row.name}`" + ("." if shelf.is_pulled(row) else ", after a pull."),
        )
    folders: dict[str, Path] = {}
    needed = drawing(row, tiny=setup.tiny)
    for part in needed[1:]:
        if not shelf.is_pulled(part):
            raise _not_pulled(shelf, part)
        folders |= {name.split("/")[0]: path for name, path in shelf.pulled(part).items()}
    licences.require(shelf.licences, needed)
    return WanModel(
        config=row.config(setup.width, setup.height),
        transformer=shelf.converted(row),
        text_encoder=folders["text_encoder"].parent,
        tokenizer=folders["tokenizer"].parent,
        vae=folders["vae"].parent,
        tiny=folders[WAN_TINY.files[0]] if setup.tiny else None,
        prompts=shelf.prompts,
        text_device=text_device,
        text_bits=setup.text_bits,
        bits=setup.bits,
        family=None if isinstance(row, Own) else row.name,
    )


def remove(shelf: Shelf, row: Download) -> int:
    """Take a family's files away, those that no other family wants; returns how many bytes are free again."""
    freed = remove_folder(shelf.models / row.name)
    if row.repo is None:
        return freed
    repo = shelf.repo(row)
    freed += shelf.unfinished(row).drop()
    for link in [path for path in repo.glob("snapshots/*/**/*") if path.is_file() or path.is_symlink()]:
        if row.wants(Path(*link.relative_to(repo).parts[2:]).as_posix()):
            link.unlink()
    kept = {link.resolve() for link in repo.glob("snapshots/*/**/*") if link.is_file()}
    for blob in repo.glob("blobs/*"):
        if blob.resolve() not in kept and blob.suffix != ENDING:  # another row's, or which another program fetches
            freed += blob.stat().st_size
            blob.unlink()
    if not kept and not any(repo.glob("blobs/*")):
        shutil.rmtree(repo, ignore_errors=True)
    return freed


def remove_folder(folder: Path) -> int:
    """Take a folder of the shelf away; of a link the link alone. Returns how many bytes are free again."""
    if folder.is_symlink():
        folder.unlink()
        return 0
    freed = _size(folder)
    shutil.rmtree(folder, ignore_errors=True)
    return freed


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def room(device: str, apart: str | None = None) -> Room:
    """How much memory is free: on the device, in the machine if that is another, and on the text encoder's own device.

    Raises AppError (`device_unusable`).
    """
    host_free = psutil.virtual_memory().available
    apart_free = None if apart is None else _free(apart, "Choose auto, cpu or swap as --text-device.")
    if device == "cpu":
        return Room(host_free, apart_free=apart_free)
    return Room(_free(device, "Choose cpu, or run the doctor."), host_free, apart_free)


def _free(device: str, remedy: str) -> int:
    import torch

    try:
        return torch.cuda.mem_get_info(device)[0]
    except (RuntimeError, AssertionError, ValueError) as error:
        raise memory_short(error) or AppError(
            "device_unusable", f"This machine cannot compute on {device!r}.", remedy
        ) from error
