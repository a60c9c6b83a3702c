"""Writes docs/families.md: which model types simlab reads, streams and probes, tried on tiny models.

    python scripts/list_families.py docs/families.md

Each model type of tests/checkpoints/family_table.py is written by transformers, streamed block by
block, held against the whole model, and probed. It takes a minute.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from simlab import ConfigError
from simlab.checkpoints.families.checkpoint import FamilyCheckpoint
from simlab.checkpoints.formats.hugging_face_keys import MODEL_TYPES, TEXT_PARTS
from simlab.experiment.families import streamed

HEAD = """# Model types

Which decoders `source=checkpoint` measures, by `model_type` in their config.json. *Native*: simlab's
own model computes it, with gradients and theory, and its random inits at true size by the
[weightless engine](weightless.md). *Streamed*: transformers {version} computes it, one block in memory
at a time; said is how far the last stream is from the whole model's, relative to its rms, in float32.
*Gradients*: if `gradients=true` is measured of the streamed model. *Rows*: what
[`simlab.probe`](probe.md) finds in a block. Of a multimodal model it is the text decoder, on token ids.
Other model types that transformers knows are tried in the same way.

`python scripts/list_families.py docs/families.md` writes this page, from tiny random models.

| model type | native, weightless | streamed | gradients | rows of a block |
|---|---|---|---|---|
"""


def main() -> None:
    """Write the page whose path is given."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("page", type=Path, help="docs/families.md")
    path = parser.parse_args().page
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests/checkpoints"))
    import transformers
    from family_table import FAMILIES, write_family

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    others = [kind for kind in MODEL_TYPES if kind in transformers.CONFIG_MAPPING]
    lines = []
    for kind in sorted({*FAMILIES, *others}):
        with tempfile.TemporaryDirectory() as folder:
            whole = write_family(Path(folder), kind)
            native = "yes" if kind in {*MODEL_TYPES, *TEXT_PARTS} else "–"
            lines.append(f"| {kind} | {native} | {' | '.join(tried(Path(folder), whole))} |")
    page = HEAD.format(version=transformers.__version__) + "\n".join(lines) + "\n"
    path.write_text(page, encoding="utf-8")


def tried(folder: Path, whole: Any) -> tuple[str, str, str]:
    """A model type's cells: how far streamed is from whole, gradients, and the kinds of its rows."""
    ids = torch.randint(97, (2, 11), generator=torch.Generator().manual_seed(0))
    checkpoint = FamilyCheckpoint(str(folder))
    skeleton = checkpoint.skeleton
    with torch.no_grad(), skeleton.filled(checkpoint.stored(skeleton)) as decoder:
        ours = decoder(input_ids=ids, use_cache=False)[0]
        theirs = whole.get_submodule(skeleton.path)(input_ids=ids, use_cache=False)[0]
    off = ((ours - theirs).abs().amax() / theirs.square().mean().sqrt()).item()
    said, gradients = f"{off:.0e}" if off else "equal", "yes"
    try:
        found = streamed(skeleton, checkpoint.stored(skeleton), ids, gradients=True)
    except ConfigError:
        gradients = "no"
        try:
            found = streamed(skeleton, checkpoint.stored(skeleton), ids)
        except ConfigError as error:
            return said, gradients, f"none: {str(error).partition(';')[0]}"
    blocks = dict.fromkeys(
        ", ".join(row.kind for row in found.rows if row.block == block)
        for block in range(checkpoint.model.depth)
    )
    several = f" (of {found.stream_count} streams)" if found.stream_count > 1 else ""
    return said, gradients, "; or ".join(blocks) + several


if __name__ == "__main__":
    main()
