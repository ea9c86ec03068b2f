"""CoSettleAdapter: a frozen backbone and its projection map frames and streams to features."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from cosettle_adapter.backbones import Backbone, HubOptions, load_backbone
from cosettle_adapter.backbones.weights import BACKBONE_FILE
from cosettle_adapter.closed_form import Settler
from cosettle_adapter.closed_form.settling import PRIOR_PAIRS, RIDGE
from cosettle_adapter.errors import ProjectionFormatError
from cosettle_adapter.features import DEFAULT_BATCH_SIZE, FeatureModel, Size
from cosettle_adapter.hub import RAW, identity_projection, load_parts
from cosettle_adapter.io import atomic_path
from cosettle_adapter.projection import Projection
from cosettle_adapter.streaming import FeatureChunk, Source, StreamOptions, stream_videos
from cosettle_adapter.version import __version__
from cosettle_adapter.video import Fit, FrameChunk, FrameSelection, open_frames, prefetch
from cosettle_adapter.video.selection import selects_frames
from cosettle_adapter.video.sources import short_name

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from cosettle_adapter.upload import Pushed

__all__ = ["DEFAULT_BATCH_SIZE", "CoSettleAdapter", "FeatureChunk", "Size"]


class CoSettleAdapter(FeatureModel):
    """A frozen backbone followed by a projection that makes its features consistent over time.

    Calling it is a pure function of the frames: no state is kept between calls, and the result
    does not depend on how frames are batched. The features of any projection can also be settled
    with the statistics of their clip: :meth:`settle` reads the whole clip first,
    ``stream(..., settle=True)`` updates the statistics as frames arrive.
    """

    # Backbone weights that are stored with the projection because they have no public source.
    _backbone_file: Path | None = None
    # The adapter before settling; in a tuple, because torch would register a plain attribute as a
    # submodule and move it twice.
    _unsettled: tuple[CoSettleAdapter, ...] = ()

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        projection: Literal["published", "fit", "settle"] | str | Path | None = None,
        recipe: int | None = None,
        allow_mismatched_backbone: bool = False,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        stride: int | None = None,
        requires_input_grad: bool = False,
        backbone_weights: str | Path | None = None,
        cache_dir: str | Path | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> CoSettleAdapter:
        """Load a backbone and its projection.

        Args:
            name: a registered name (``list_models()``), a Hub repository ``owner/name``, a folder
                that :meth:`save_pretrained` wrote, or a backbone's folder saved by transformers.
                For a folder that is named like a model, write ``./name`` or pass a ``Path``.
            projection: ``"published"``; ``"fit"``, read from the cache, or fitted on the package's
                photographs in about a minute and cached; a folder with a projection for the
                backbone ``name``; or ``"settle"``, which uses no projection and settles the
                default layer with the statistics of each clip: of all frames of a call in
                :meth:`forward`, of the frames so far in :meth:`stream`. Default: the published
                projection if there is one, else ``"fit"``.
            recipe: required recipe version of the projection.
            allow_mismatched_backbone: accept a projection fitted on a backbone with other weights.
            device, dtype: of the backbone and the features (float32, bfloat16 or float16);
                positions and the projection stay float32.
            stride: step between patches in pixels; below the patch size, patches overlap.
            requires_input_grad: let gradients flow back to the frames.
            backbone_weights: safetensors file, PyTorch checkpoint or folder saved by transformers,
                in timm's, the authors', OpenAI's or Hugging Face's layout, in place of the
                registered source.
            cache_dir: cache folder for backbone and projection, in place of ``HF_HOME``.
            revision: branch, tag or commit of the projection's repository; of the backbone's
                repository if the projection is in the package.
            token: for private or gated repositories.
            local_files_only: never use the network.

        Raises:
            UnknownModelError: no such model; the message suggests similar names.
            WeightsUnavailableError: no source provided a file; the message lists those tried.
            CorruptWeightsError, ProjectionFormatError: a file is damaged or of another format.
            BackboneMismatchError: the projection belongs to another backbone.
        """
        backbone, fitted, file = load_parts(
            name,
            projection,
            recipe=recipe,
            weights=backbone_weights,
            options=HubOptions(cache_dir, revision, token, local_files_only),
            device=device,
            dtype=dtype,
            stride=stride,
            requires_input_grad=requires_input_grad,
        )
        adapter = cls(backbone, fitted, allow_mismatched_backbone=allow_mismatched_backbone)
        adapter._backbone_file = file
        adapter.settles = projection == "settle"
        return adapter

    @classmethod
    def raw(
        cls,
        backbone: str | Path | Backbone,
        *,
        layer: int | None = None,
        norm: bool | None = None,
        **loading: Any,
    ) -> CoSettleAdapter:
        """Return an adapter without a projection: the backbone's own tokens, as a baseline.

        Args:
            backbone: a loaded backbone, or a name with ``loading`` as in :meth:`from_pretrained`.
            layer: 0-based, negative from the end; default: the backbone's default layer.
            norm: apply the final norm; default: for the last layer, as its registry row says.
        """
        if isinstance(backbone, (str, Path)):
            fields = {field.name for field in dataclasses.fields(HubOptions)} & loading.keys()
            options = HubOptions(**{name: loading.pop(name) for name in fields})
            weights = loading.pop("backbone_weights", None)
            backbone = load_backbone(backbone, weights=weights, options=options, **loading)
        return cls(backbone, identity_projection(backbone, layer=layer, norm=norm))

    def without_projection(self) -> CoSettleAdapter:
        """Return an adapter of the tokens that this projection reads, with the same backbone."""
        config = dataclasses.replace(
            self.config,
            kind="identity",
            out_width=self.config.in_width,
            averaging=0.0,
            settled=False,
            recipe=None,
            fit={"method": RAW},
            figures={},
        )
        return CoSettleAdapter(self.backbone, Projection(config), allow_mismatched_backbone=True)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the projection and its config into ``folder``.

        The backbone is included only if it came with the projection and has no public source.
        """
        self._check_savable()
        self.projection.save(folder)
        copy = Path(folder) / BACKBONE_FILE
        if self._backbone_file is not None and copy.resolve() != self._backbone_file.resolve():
            with atomic_path(copy) as path:
                shutil.copyfile(self._backbone_file, path)

    def push_to_hub(self, repo_id: str, **options: Any) -> Pushed:
        """Upload what :meth:`save_pretrained` writes, with a generated model card.

        ``options`` and errors are those of :func:`cosettle_adapter.upload.push`.
        """
        from cosettle_adapter.upload import push  # slow to import and rarely used

        self._check_savable()
        if self._backbone_file is not None:
            extra = options.get("extra_files") or {}
            options["extra_files"] = {BACKBONE_FILE: self._backbone_file, **extra}
        return push(self.projection, repo_id, **options)

    def _check_savable(self) -> None:
        if self.settles:
            raise ProjectionFormatError(
                "this adapter has no projection to save: it settles each clip separately. Save the "
                "projection of one clip, adapter.settle(clip), or fit one on many clips: "
                f"cosettle-adapter fit --backbone {self.backbone.row.name} --data clips/"
            )

    @selects_frames
    def stream(
        self,
        source: Any,
        *,
        select: FrameSelection | None = None,
        batch_size: int = DEFAULT_BATCH_SIZE,
        skip: int = 0,
        **options: Unpack[StreamOptions],
    ) -> Iterator[FeatureChunk]:
        """Yield the features of a video of any length, in frame order, in constant memory.

        Args:
            source: a video file, its URL, a camera, a folder or glob of images, an array, or an
                iterator of frames, as in :func:`~cosettle_adapter.video.open_frames`.
            select: frames to encode; all by default.
            batch_size: frames per chunk.
            skip: number of selected frames to skip without encoding them, to resume a stream.
            size, fit, normalize: as in :meth:`forward`.
            return_backbone: fill ``chunk.backbone``.
            return_special: fill ``chunk.cls`` and ``chunk.registers`` with the tokens that
                :meth:`tokens` returns, neither settled nor fused.
            settle: settle each frame with the statistics of the frames up to it, which suits live
                streams; default: ``self.settles``. For a whole clip, see :meth:`settle`.
            forgetting: with ``settle``, the factor on the statistics of earlier frames at each new
                frame; below 1 for streams that change: 0.99 remembers about 100 frames.
            temporal_fusion: average every patch with its matches in neighbouring frames, after
                settling (:class:`~cosettle_adapter.correspondence.TemporalFusion`):
                ``"symmetric"`` uses past and future frames and delays features by two frames,
                ``"causal"`` uses past frames only. Fused features carry no gradients.
            dense, upsampler: as in :meth:`forward`, applied last.

        Raises:
            FrameError: the source has no frames, or frames of an unsupported shape or range, or
                frames of several sizes that ``size`` does not bring to one grid.
            DamagedError: with ``select.on_damage="error"``, after the features before the damage.
        """
        one_size = options.get("size") is None
        frames = open_frames(source, select, skip=skip, chunk_size=batch_size, one_size=one_size)
        chunks = stream_videos(self, [(source, frames)], options, batch_size=batch_size)
        return (chunk for _, chunk in chunks)

    def stream_many(
        self,
        sources: Iterable[Source],
        *,
        select: FrameSelection | None = None,
        batch_size: int = 32,
        on_error: Callable[[Source, Exception], None] | None = None,
        **options: Unpack[StreamOptions],
    ) -> Iterator[tuple[Source, FeatureChunk]]:
        """Yield ``(source, chunk)`` for one video after the other, with batches across videos.

        Batches that short videos leave half empty in :meth:`stream` are filled with frames of the
        next videos, if all have one size or ``size`` is given. Settling and fusion restart with
        each video. Features equal those of :meth:`stream` up to rounding, which depends on the
        batch; ``extract``, which writes the same bytes after an interruption, does not use this.

        Args:
            sources: list or iterator of videos as :meth:`stream` takes them. A thread reads them
                one after the other, a few batches ahead.
            select: as in :meth:`stream`, for every video.
            batch_size: frames per forward pass, and at most per chunk.
            on_error: called with a source and its error, after the features of the frames before
                it; then the next video follows. By default, the error is raised.
            **options: as in :meth:`stream`, but without ``skip``.

        Raises:
            FrameError, DamagedError: as in :meth:`stream`, during the iteration.
        """
        if isinstance(sources, (str, os.PathLike)):
            raise TypeError(
                f"expected several sources, got one path, {sources}: give a list of paths, such as "
                "cosettle_adapter.video.find_videos(folder), or call stream"
            )
        one_size = options.get("size") is None

        def opened(source: Source) -> Generator[FrameChunk, None, None]:
            yield from open_frames(source, select, chunk_size=batch_size, one_size=one_size)

        videos = ((source, opened(source)) for source in sources)
        return stream_videos(self, videos, options, batch_size=batch_size, on_error=on_error)

    @selects_frames
    @torch.no_grad()
    def settle(
        self,
        source: Any,
        *,
        select: FrameSelection | None = None,
        batch_size: int = DEFAULT_BATCH_SIZE,
        size: Size | None = None,
        fit: Fit = "resize",
        ridge: float = RIDGE,
        prior_pairs: float = PRIOR_PAIRS,
    ) -> CoSettleAdapter:
        """Return an adapter refined with the statistics of one clip (:class:`Settler`).

        The clip's mean token is subtracted, and directions in which corresponding patches of
        adjacent frames differ are damped. The new adapter shares the backbone and keeps this
        adapter as :attr:`unsettled`: settling again starts from there and does not accumulate.

        Args:
            source, select, size, fit, batch_size: as in :meth:`stream`.
            ridge: in units of the mean temporal variance; larger values damp less, infinity only
                centres.
            prior_pairs: number of corresponding patches at which the clip counts as much as the
                prior, which damps all directions equally.
        """
        base = self.unsettled
        settler = Settler(base.width, ridge=ridge, prior_pairs=prior_pairs)
        frames = open_frames(source, select, chunk_size=batch_size)
        for chunk in prefetch(frames):
            settler.update(base._encode(chunk.frames, size=size, fit=fit)[1])
        is_path = isinstance(source, (str, Path))
        record = {
            "method": "settled on one clip: centred, then damped by the clip's own intra-video "
            "covariance, after the projection under base",
            "clip": short_name(source) if is_path else type(source).__name__,
            "frames": settler.frames,
            "pairs": round(settler.pairs),
            "ridge": ridge if ridge < float("inf") else None,
            "prior_pairs": prior_pairs,
            "cosettle_adapter": __version__,
        }
        projection = base.projection.followed_by(settler.solution(), record)
        settled = CoSettleAdapter(base.backbone, projection, allow_mismatched_backbone=True)
        settled._backbone_file = base._backbone_file
        settled._unsettled = (base,)
        return settled

    @property
    def unsettled(self) -> CoSettleAdapter:
        """The adapter this one was settled from; itself if it was loaded or never settled."""
        if not self._unsettled:
            return self
        (base,) = self._unsettled
        base.projection.to(self.device)
        return base
