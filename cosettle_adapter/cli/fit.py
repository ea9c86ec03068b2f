"""The command ``fit``: a projection fitted on your own videos."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter, Token, default_name_transform
from rich.table import Table

from cosettle_adapter.backbones import HubOptions, load_backbone
from cosettle_adapter.cli.common import Output, console, frame_progress, rate
from cosettle_adapter.cli.train import print_next, print_skipped
from cosettle_adapter.training.corpus import Corpus
from cosettle_adapter.training.fit import FitSettings, fit_projection, labels
from cosettle_adapter.training.statistics import Layers

_NAMES = {"solvers": "solver", "gaps": "gap"}


def parse_sets(_: Any, tokens: Sequence[Token]) -> list[Layers]:
    """Parse sets of layers: ``5+7+9+11``."""
    sets = [token.value.split("+") for token in tokens]
    if not all(len(layers) > 1 and all(map(str.isdigit, layers)) for layers in sets):
        raise ValueError(f"expected layers such as 7+11, got {tokens[-1].value!r}")
    return [tuple(map(int, layers)) for layers in sets]


def fit(
    *,
    backbone: str,
    data: list[str],
    output: Output,
    settings: Annotated[
        FitSettings,
        Parameter(
            name="*",
            name_transform=lambda name: _NAMES.get(name) or default_name_transform(name),
            parse=re.compile("^(?!concatenations|strengths)"),
        ),
    ] = FitSettings(),  # frozen
    concatenate: Annotated[
        list[Layers] | None, Parameter(converter=parse_sets, n_tokens=-1)
    ] = None,
    strengths: Annotated[
        tuple[float, ...] | None, Parameter(name=("--strengths", "--ridge"))
    ] = None,
    candidates: Path | None = None,
    workers: int = 0,
    licence: str | None = None,
    about_data: str = "",
    backbone_weights: Path | None = None,
    device: str = "cpu",
    cache_dir: Path | None = None,
    offline: bool = False,
) -> None:
    """Fit a projection for a backbone on your own videos; needs neither labels nor a GPU.

    Args:
        backbone: registered name, timm:TAG or open_clip:ARCHITECTURE/TAG.
        data: folders, lists, patterns or WebDataset shards of videos.
        output: folder to write.
        concatenate: sets of layers to read together, such as 7+11, as further candidates; no such
            sets if empty.
        strengths: candidate strengths of the solvers; all that a solver lists if empty.
        candidates: folder in which to save every candidate projection.
        workers: processes that decode videos; 0 decodes between encoder passes.
        licence: licence to record; by default the backbone's.
        about_data: description of the clips to record.
        backbone_weights: the backbone's weights: a safetensors file, a checkpoint or a folder.
        device: torch device of the encoder.
        cache_dir: cache folder in place of HF_HOME.
        offline: never access the network.
    """
    out, corpus = console(), Corpus.open(data)
    with out.status(f"loading {backbone}"):
        hub = HubOptions(cache_dir=cache_dir, local_files_only=offline)
        loaded = load_backbone(backbone, weights=backbone_weights, device=device, options=hub)
    sets = None if concatenate is None else tuple(concatenate)
    settings = dataclasses.replace(settings, concatenations=sets, strengths=strengths)
    about = about_data or ", ".join(Path(place).name for place in data)
    with frame_progress(out) as progress:
        task = progress.add_task("clips", total=None, rate="")

        def advance(done: int, total: int) -> None:
            speed = rate(done, progress.tasks[task].elapsed, unit="clips")
            progress.update(task, completed=done, total=total, rate=speed)

        result = fit_projection(
            loaded, corpus, settings, licence=licence, data=about, workers=workers, on_clip=advance
        )
    if candidates is not None:
        for candidate, projection in result.projections.items():
            projection.save(candidates / str(candidate))
    result.projection.save(output)
    names = labels(result.projections)
    if result.scores:
        table = Table("layers", "overlap", title="Overlap on rendered clips", title_justify="left")
        for candidate, score in result.scores.items():
            table.add_row(names[candidate], f"{score:.3f}")
        out.print(table)
    out.print(f"layers {names[result.chosen]}", markup=False)
    print_skipped(out, list(result.skipped.items()))
    print_next(out, "load it with CoSettleAdapter.from_pretrained('{}')", output)
