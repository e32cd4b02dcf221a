"""What is to be had on the hub, one row of data for each; here the parts that stand beside every student on Wan.

A row of the students' own table (`pipeline.models`) is one of these too. Knows no network and no disk.
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True, kw_only=True)
class Download:
    """Files of one repo on the hub, and under which licence."""

    name: str
    title: str
    source: str
    """Where the row was read."""
    licence: str
    """Of the weights."""
    commercial: bool | None
    """Whether the licence allows commercial use; None: no source says."""
    repo: str | None = None
    """On the hub; None: the weights come with Stillstream."""
    files: tuple[str, ...] = ()
    """What is fetched, as patterns; of a checkpoint's row the first is the checkpoint, "x/*" where that is a folder."""
    unverified: tuple[str, ...] = ()

    @property
    def needs_consent(self) -> bool:
        """Whether its licence has to be accepted first: unless a source says it, and that all use is allowed."""
        return not self.commercial or "licence" in self.unverified

    def wants(self, path: str) -> bool:
        """Whether a file of the repo is one of ours."""
        return any(fnmatchcase(path, pattern) for pattern in self.files)


_WAN_REPO = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
WAN_TEXT = Download(
    name="wan-text",
    title="Wan's text encoder, UMT5-XXL",
    source=f"https://huggingface.co/{_WAN_REPO}",
    licence="Apache-2.0",
    commercial=True,
    repo=_WAN_REPO,
    files=("text_encoder/*", "tokenizer/*"),
)
WAN_VAE = Download(
    name="wan-vae",
    title="Wan's autoencoder",
    source=f"https://huggingface.co/{_WAN_REPO}",
    licence="Apache-2.0",
    commercial=True,
    repo=_WAN_REPO,
    files=("vae/*",),
)
WAN_TINY = Download(
    name="wan-tiny",
    title="The tiny decoder and encoder of Wan's latents, taew2_1 of TAEHV",
    source="https://github.com/madebyollin/taehv",
    licence="MIT (of the code)",
    commercial=None,
    repo="lightx2v/Autoencoders",
    files=("taew2_1.safetensors",),
    unverified=("licence", "weights"),
)
PARTS = (WAN_TEXT, WAN_VAE, WAN_TINY)
