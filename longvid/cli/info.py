"""What ``longvid info`` says of a store."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from longvid.cli.footage import footage_lines
from longvid.models.numerics import Numerics
from longvid.store.metadata import StoreMetadata
from longvid.store.reader import LatentStore, open_reader
from longvid.units import format_bytes

__all__ = ["describe_store"]


def describe_store(path: str) -> tuple[dict[str, Any], str]:
    """The facts of a store, ready for JSON, and the same as text.

    Raises:
        StoreError: there is no store that longvid wrote.
    """
    reader = open_reader(path)
    store, model = reader.metadata, reader.metadata.vae
    own, words = _frame_facts(store) if store.kind == "frames" else _latent_facts(LatentStore(reader))
    recorded = store.attributes["longvid"]
    facts = {
        "kind": store.kind,
        **own,
        **{name: getattr(store, name) for name in ("complete", "numerics", "source")},
        "model": model,
        "part": None if store.part is None else asdict(store.part),
        "seams": [asdict(seam) for seam in store.seams],
        **{name: recorded.get(name) for name in ("run", "joints", "damage", "last_frame_duration")},
        "stored_bytes": reader.stored_bytes,
    }
    lines = [f"{path}: {'complete' if store.complete else 'incomplete'}, {facts['frames']} {words}"]
    if store.numerics:
        lines.append(f"computed  {Numerics.from_dict(store.numerics).words}")
    seed, scale = model.get("random_weights"), f"scaling_factor {model.get('scaling_factor')}"
    scale = "latents_mean and latents_std by channel" if model.get("latents_mean") else scale
    lines.append(
        f"model     {model.get('name_or_path') or model.get('class_name')}"
        + ("" if seed is None else f" with random weights (seed {seed})")
        + ("" if store.kind == "frames" else f", {scale}")
    )
    lines += footage_lines(store)
    if store.part is not None:
        lines.append(f"part      {store.part}; longvid join makes one store of all parts")
    lines += [f"seam      {seam}" for seam in store.seams]
    lines.append(f"stored    {format_bytes(reader.stored_bytes)}")
    return facts, "\n".join(lines)


def _latent_facts(store: LatentStore) -> tuple[dict[str, Any], str]:
    padded = int((~store.latents_valid).sum())
    facts = {
        "frames": store.num_frames,
        "latent_shape": list(store.latents.shape),
        "latent_dtype": str(store.latents.dtype),
        "latents_valid": store.num_latents - padded,
        "representation": store.representation,
        "chunk_plan": store.schedule.to_dict(),
    }
    shape = "x".join(map(str, store.latents.shape))
    padding = f"; the last {padded} stand for no frame" if padded else ""
    return facts, (
        f"frames of {store.width}x{store.height}\n"
        f"latents   {shape} (t c y x) {store.latents.dtype}, {store.representation}, raw (not scaled){padding}\n"
        f"plan      {store.schedule.words}"
    )


def _frame_facts(store: StoreMetadata) -> tuple[dict[str, Any], str]:
    num_frames, height, width, _ = shape = store.main.shape
    facts = {
        "frames": num_frames,
        "frame_shape": list(shape),
        "frame_rate": store.attributes["longvid"].get("frame_rate"),
        "latents": store.origin,
    }
    return facts, f"decoded frames of {width}x{height}\nlatents   {store.origin}"
