"""Model cards: what a projection is, how it was found, what it was measured to do, its licence.

A card says nothing that its config and its backbone's registry row do not say. Figures come from
``ProjectionConfig.figures``, in which every key is optional:

- ``summary``: one line, which ``cosettle-adapter list`` shows;
- ``about``: paragraphs to read before anything else;
- ``choice``: paragraphs on how the block and the settings were chosen;
- ``measured``: tables, each ``{"title", "protocol", "command", "columns", "rows", "highlight"}``;
  ``command`` printed the figures, ``rows`` holds one list a row (``null`` for an empty cell), and
  the row whose first cell is ``highlight`` is set in bold;
- ``limits``: sentences.

``ProjectionConfig.fit`` is shown as it is, but for ``command`` (which fits it again) and
``overlap_by_block`` (by which the block was chosen); ``datasets`` names data sets of the Hub.
"""

from __future__ import annotations

from huggingface_hub import ModelCardData

from cosettle_adapter.backbones import REGISTRY, BackboneRow, lookup
from cosettle_adapter.cards.licences import binding_licence, hub_licence
from cosettle_adapter.cards.sections import Subject, render
from cosettle_adapter.conversion import RELEASED
from cosettle_adapter.errors import CosettleError
from cosettle_adapter.projection import CONFIG_FILE, ProjectionConfig
from cosettle_adapter.published import bundled_folder

__all__ = ["model_card", "weights_card", "weights_cards"]

_TAGS = ["cosettle", "video", "temporal-consistency", "image-feature-extraction"]


def model_card(config: ProjectionConfig, *, repository: str | None = None) -> str:
    """Return the ``README.md`` of a projection's Hub repository.

    Args:
        config: of the projection.
        repository: ``owner/name``, for the title and the example.
    """
    try:
        row = lookup(config.backbone)
    except CosettleError:  # fitted with a registry that had more rows
        row = None
    datasets = config.fit.get("datasets")
    data = ModelCardData(
        **hub_licence(binding_licence(config, row)),
        library_name="cosettle-adapter",
        pipeline_tag="image-feature-extraction",
        tags=_TAGS,
        base_model=row.hub.repo if row is not None and row.hub is not None else None,
        datasets=list(datasets) if isinstance(datasets, (list, tuple)) and datasets else None,
    )
    title = repository or f"A projection for {config.backbone}"
    name = repository or "./my-projection"
    released = config.fit.get("method") == RELEASED
    body = render(Subject(config, row, title=title, name=name, released=released))
    return f"---\n{data.to_yaml().strip()}\n---\n\n{body}"


def weights_card(row: BackboneRow, config: ProjectionConfig | None) -> str:
    """Return the card of a registered model for ``weights_cards/``.

    Args:
        row: the backbone.
        config: of the projection that travels in the package; ``None`` for one that the paper's
            authors published.
    """
    if config is not None:
        return render(Subject(config, row, title=row.name, name=row.name))
    theirs = ProjectionConfig(
        backbone=row.name,
        fingerprint=row.fingerprint or "",
        layers=(row.depth - 1,),
        norm=row.final_norm,
        in_width=row.width,
        out_width=row.width,
        licence=row.licence,
    )
    return render(Subject(theirs, row, title=row.name, name=row.name, released=True))


def weights_cards() -> dict[str, str]:
    """Return every card of ``weights_cards/``: file name to text."""
    cards = {}
    for row in REGISTRY.values():
        folder = bundled_folder(row.name)
        if folder is not None:
            text = (folder / CONFIG_FILE).read_text(encoding="utf-8")
            config = ProjectionConfig.from_json(text, source=str(folder / CONFIG_FILE))
            cards[f"{row.name}.md"] = weights_card(row, config)
        elif row.release is not None:
            cards[f"{row.name}.md"] = weights_card(row, None)
    return cards
