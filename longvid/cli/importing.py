"""What the command line does with a file of latents in the place of a store."""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from longvid.errors import ModelError, OptionError, SourceError
from longvid.files import is_latent_file

if TYPE_CHECKING:
    from longvid.models.base import CausalVAE
    from longvid.store.reader import LatentStore

__all__ = ["check_import_options", "imported"]

_OPTIONS = ("normalized", "num_frames", "fps", "channel_axis", "tensor")


def check_import_options(args: argparse.Namespace) -> None:
    """Raise an error for a file without a model, and for options of a file with a store."""
    given = [f"--{name.replace('_', '-')}" for name in _OPTIONS if getattr(args, name) not in (None, False)]
    if is_latent_file(args.store):
        if not Path(args.store).is_file():
            raise SourceError(f"there is no file of latents {args.store}", kind="missing")
        if args.model is None:
            raise ModelError(f"{args.store} does not record whose latents it holds; name the model with --model")
    elif given:
        raise OptionError(
            f"{', '.join(given)}: only for a file of latents; {args.store} is not one, and stores record it"
        )


def imported(args: argparse.Namespace, model: CausalVAE) -> AbstractContextManager[LatentStore]:
    """The file of latents that a command names, as a store of this model."""
    from longvid.runtime.exchange.importer import ImportOptions, latent_file_as_store

    options = ImportOptions(**{name: getattr(args, name) for name in _OPTIONS})
    return latent_file_as_store(args.store, model, options)
