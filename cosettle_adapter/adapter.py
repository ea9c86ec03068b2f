"""CoSettleAdapter: a frozen backbone and its projection, from frames to features."""

from __future__ import annotations

import collections
import dataclasses
import functools
import logging
import shutil
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from einops import pack, rearrange, unpack
from torch import Tensor, nn
from torch.nn import functional as F

from cosettle_adapter.backbones import (
    Backbone,
    HubOptions,
    load_backbone,
)
from cosettle_adapter.backbones.released import BACKBONE_FILE
from cosettle_adapter.closed_form import Settler, settle_clip
from cosettle_adapter.closed_form.settling import PRIOR_PAIRS, RIDGE
from cosettle_adapter.correspondence.fusion import FusionMode, TemporalFusion, fusion_guide
from cosettle_adapter.errors import (
    BackboneMismatchError,
    ProjectionFormatError,
    TruncatedVideoError,
)
from cosettle_adapter.files import atomic_path
from cosettle_adapter.fitting import find_recipe
from cosettle_adapter.fitting_cache import fitted_projection
from cosettle_adapter.projection import Projection, ProjectionConfig
from cosettle_adapter.published import PublishedProjection, find_projection, is_published
from cosettle_adapter.version import __version__
from cosettle_adapter.video import FrameChunk, FrameSelection, open_frames, pinned, prefetch
from cosettle_adapter.video.arrays import as_frames
from cosettle_adapter.video.geometry import Fit, Geometry, plan_geometry
from cosettle_adapter.video.resampling import apply_geometry
from cosettle_adapter.video.selection import selected

if TYPE_CHECKING:
    from cosettle_adapter.hub import Pushed

logger = logging.getLogger(__name__)

Size = int | tuple[int, int]

DEFAULT_BATCH_SIZE = 8


@dataclasses.dataclass(frozen=True)
class FeatureChunk:
    """Features of consecutive frames of a stream.

    Attributes:
        features: ``(N, C, h, w)``.
        timestamps: ``(N,)`` float64, seconds.
        geometry: how cells map to pixels of the source's frames.
        start: number of frames delivered before this chunk.
        backbone: ``(N, C, h, w)`` tokens before the projection, if they were asked for.
    """

    features: Tensor
    timestamps: Tensor
    geometry: Geometry
    start: int
    backbone: Tensor | None = None


class CoSettleAdapter(nn.Module):
    """A frozen backbone followed by the projection that settles its features over time.

    Calling it is a pure function of the frames: no state is kept between calls, and the result
    does not depend on how frames are batched. On top of any projection, features can be settled
    by the statistics of the very clip they come from: :meth:`settle` looks at a clip first,
    ``stream(..., settle=True)`` learns as frames arrive.

    Example:
        >>> adapter = CoSettleAdapter.from_pretrained("dinov2-vits14-pypi")
        >>> frames = torch.randint(0, 256, (4, 3, 280, 490), dtype=torch.uint8)
        >>> adapter(frames).shape
        torch.Size([4, 384, 20, 35])

    Attributes:
        backbone: the frozen encoder.
        projection: the head; frozen as well until ``projection.requires_grad_(True)``.
        settles: whether features are settled unless a call says otherwise, as they are after
            ``from_pretrained(name, projection="settle")``.
    """

    def __init__(
        self,
        backbone: Backbone,
        projection: Projection,
        *,
        allow_mismatched_backbone: bool = False,
    ) -> None:
        """Put a projection on a backbone.

        Args:
            backbone: a loaded backbone.
            projection: a projection fitted on that very backbone.
            allow_mismatched_backbone: accept a projection fitted on other tensors.

        Raises:
            BackboneMismatchError: the projection was fitted on a backbone with another
                fingerprint.
            ProjectionFormatError: the projection reads another number of channels.
        """
        super().__init__()
        config = projection.config
        read = sum(backbone.widths[backbone.block(layer)] for layer in config.layers)
        if config.in_width != read:
            raise ProjectionFormatError(
                f"the projection reads {config.in_width} channels, but {len(config.layers)} "
                f"block(s) of {backbone.row.name} have {read}"
            )
        if config.fingerprint != backbone.fingerprint and not allow_mismatched_backbone:
            raise BackboneMismatchError(
                f"this projection was fitted on {config.backbone} with fingerprint "
                f"{_short(config.fingerprint)}, but the backbone here is {backbone.row.name} with "
                f"fingerprint {_short(backbone.fingerprint)}. Load the backbone it names, fit a "
                "projection for this one (projection='fit'), or pass "
                "allow_mismatched_backbone=True if you know that they are interchangeable"
            )
        self.backbone = backbone
        self.projection = projection
        self.settles = False
        # A backbone that came with the projection and can be had from nowhere else.
        self._backbone_file: Path | None = None
        # What was settled; in a tuple, since a module would be registered and moved twice.
        self._unsettled: tuple[CoSettleAdapter, ...] = ()

    @property
    def config(self) -> ProjectionConfig:
        """The projection's config."""
        return self.projection.config

    @property
    def width(self) -> int:
        """Channels of the features."""
        return self.config.out_width

    @property
    def device(self) -> torch.device:
        """Device of the backbone, where features are computed and returned."""
        return self.backbone.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the backbone and of the features."""
        return self.backbone.dtype

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        projection: Literal["published", "fit", "settle"] | str | Path | None = None,
        recipe: int | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        stride: int | None = None,
        backbone_weights: str | Path | None = None,
        allow_mismatched_backbone: bool = False,
        requires_input_grad: bool = False,
        cache_dir: str | Path | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> CoSettleAdapter:
        """Load a backbone and its projection.

        Args:
            name: a registered name (``list_models()``), a Hub repository ``owner/name``, or a
                folder that :meth:`save_pretrained` wrote (``./name`` where it could be mistaken).
            projection: by default the published one, if ``name`` has one; else the one in the
                cache; else one is fitted there and then, on photographs in the package, in a
                minute or so. To say it: ``"published"``; ``"fit"``, which leaves a published one
                out; the folder of a projection for the backbone ``name``; or ``"settle"``, which
                uses no stored one: the backbone's default block is settled by the statistics of
                each clip, on the frames of the call in :meth:`forward`, as frames arrive in
                :meth:`stream`.
            recipe: version of the recipe that the projection must have been fitted by; the
                newest if not given.
            device: where to put both.
            dtype: dtype of the backbone and of the features (float32, bfloat16 or float16);
                positions and the projection stay float32.
            stride: step between patches in pixels; smaller than the patch makes them overlap.
            backbone_weights: a file in place of the registered sources: safetensors or a PyTorch
                checkpoint, in timm's, the authors', OpenAI's or Hugging Face's layout.
            allow_mismatched_backbone: accept a projection fitted on other tensors.
            requires_input_grad: let gradients reach the frames.
            cache_dir: cache for backbone and projection, in place of ``HF_HOME``.
            revision: branch, tag or commit of the repository ``name`` stands for: the one the
                projection comes from, or the backbone's where the projection is in the package.
            token: access token for private or gated repositories.
            local_files_only: never touch the network, for the backbone or the projection.

        Raises:
            UnknownModelError: no such model; close names are suggested.
            ValueError: ``projection`` is something else, no such recipe, or a projection made
                by another one.
            StatisticsError: the backbone's features are of no use, so nothing can be fitted.
            WeightsUnavailableError: a file could not be had; the message lists what was tried.
            CorruptWeightsError, ProjectionFormatError: a file is not what it should be.
            BackboneMismatchError: the projection belongs to another backbone.
        """
        options = HubOptions(
            cache_dir=cache_dir, revision=revision, token=token, local_files_only=local_files_only
        )
        loading: dict[str, Any] = {
            "device": device,
            "dtype": dtype,
            "stride": stride,
            "requires_input_grad": requires_input_grad,
        }
        find_recipe(recipe)
        load = functools.partial(
            load_backbone, str(name), weights=backbone_weights, options=options
        )
        if projection == "settle":
            return cls._settling(load(**loading))
        if projection == "fit" or (projection is None and not is_published(name)):
            backbone = load(**loading)
            fitted = fitted_projection(
                backbone, options, recipe=recipe, native=lambda: load(device=device)
            )
            return cls(backbone, fitted.to(device))
        if projection is None or projection == "published":
            published = find_projection(name, options)
        elif Path(projection).expanduser().is_dir():
            published = PublishedProjection(Path(projection).expanduser())
        else:
            raise ValueError(
                "projection must be None, 'published', 'fit', 'settle' or a folder that "
                f"save_pretrained wrote, got {str(projection)!r}"
            )
        stored = Projection.load(published.folder)
        if recipe not in (None, stored.config.recipe):
            raise ValueError(
                f"the projection of {name} was not made by recipe {recipe} (but by "
                f"{stored.config.recipe}); projection='fit' fits one by it"
            )
        own = projection in (None, "published")
        if own and not published.bundled:
            options = dataclasses.replace(options, revision=stored.config.backbone_revision)
        backbone = load_backbone(
            stored.config.backbone if own else str(name),
            weights=backbone_weights or published.backbone_weights,
            options=options,
            **loading,
        )
        adapter = cls(
            backbone,
            stored.to(device),
            allow_mismatched_backbone=allow_mismatched_backbone,
        )
        if backbone_weights is None and stored.config.backbone_revision is None:
            adapter._backbone_file = published.backbone_weights
        return adapter

    @classmethod
    def _settling(cls, backbone: Backbone) -> CoSettleAdapter:
        """The default block, settled on each clip."""
        adapter = cls.raw(backbone)
        fit = {"method": "none: the backbone's own tokens, settled on each clip as it comes"}
        adapter.projection = Projection(dataclasses.replace(adapter.config, fit=fit))
        adapter.settles = True
        return adapter

    @classmethod
    def raw(
        cls,
        backbone: str | Backbone,
        *,
        layer: int | None = None,
        norm: bool | None = None,
        backbone_weights: str | Path | None = None,
        cache_dir: str | Path | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        **loading: Any,
    ) -> CoSettleAdapter:
        """Put no projection on a backbone: its own tokens through the same interface.

        What to compare a projection with, and the way to read any block of any backbone.

        Args:
            backbone: a registered name, or a loaded backbone.
            layer: 0-based block or feature map, negative from the end; by default the last
                block, or the feature map that is the registered grid.
            norm: apply the final norm; by default as the registry says for the last block, and
                not for earlier ones.
            backbone_weights: with a name, as in :meth:`from_pretrained`; so are all that follow.
            cache_dir: cache in place of ``HF_HOME``.
            revision: branch, tag or commit of the backbone's repository.
            token: access token for private or gated repositories.
            local_files_only: never touch the network.
            **loading: ``device``, ``dtype``, ``stride``, ``requires_input_grad``.
        """
        if isinstance(backbone, str):
            options = HubOptions(
                cache_dir=cache_dir,
                revision=revision,
                token=token,
                local_files_only=local_files_only,
            )
            backbone = load_backbone(backbone, weights=backbone_weights, options=options, **loading)
        block = backbone.default_layer if layer is None else backbone.block(layer)
        if norm is None:
            norm = block == backbone.depth - 1 and backbone.row.final_norm
        config = ProjectionConfig(
            backbone=backbone.row.name,
            fingerprint=backbone.fingerprint,
            layers=(block,),
            norm=norm,
            backbone_revision=backbone.revision,
            in_width=backbone.widths[block],
            out_width=backbone.widths[block],
            kind="identity",
            fit={"method": "none: the backbone's own tokens"},
            licence=backbone.row.licence,
        )
        return cls(backbone, Projection(config))

    def without_projection(self) -> CoSettleAdapter:
        """Return the tokens the projection reads through the same interface: what it is beside.

        The backbone is shared.
        """
        config = dataclasses.replace(
            self.config,
            kind="identity",
            out_width=self.config.in_width,
            settled=False,
            recipe=None,
            averaging=0.0,
            fit={"method": "none: the backbone's own tokens"},
            figures={},
        )
        return CoSettleAdapter(self.backbone, Projection(config), allow_mismatched_backbone=True)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the projection and its config into ``folder``.

        The backbone stays out, unless it came with the projection and has no public source: a
        converted release whose backbone is not the public one.

        Raises:
            ProjectionFormatError: there is nothing to save, because the adapter settles on every
                clip anew.
        """
        self._check_stored()
        self.projection.save(folder)
        copy = Path(folder) / BACKBONE_FILE
        if self._backbone_file is not None and copy.resolve() != self._backbone_file.resolve():
            with atomic_path(copy) as path:
                shutil.copyfile(self._backbone_file, path)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        token: str | bool | None = None,
        commit_message: str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        card: str | None = None,
        overwrite_card: bool = False,
        extra_files: Mapping[str, Path] | None = None,
    ) -> Pushed:
        """Upload the projection, its config and a generated model card.

        The backbone is uploaded only where :meth:`save_pretrained` would write it. One commit;
        everything is as :func:`cosettle_adapter.hub.push` says.

        Args:
            repo_id: ``owner/name``, created if there is none.
            private: create a private repository; an existing public one is refused.
            token: access token with write permission; ``None`` uses the stored one.
            commit_message: first line of the commit.
            revision: branch to commit to.
            create_pr: open a pull request in place of committing.
            card: text of ``README.md`` in place of the generated one.
            overwrite_card: replace a card that somebody edited on the Hub.
            extra_files: path in the repository to local file, to upload with it.

        Returns:
            Page and id of the commit; the id is a ``revision`` for :meth:`from_pretrained`.

        Raises:
            UnknownModelError: ``repo_id`` cannot be the name of a repository.
            HubUploadError: no token, no permission, no network, or the Hub refused.
        """
        from cosettle_adapter.hub import push

        self._check_stored()
        if self._backbone_file is not None:
            extra_files = {BACKBONE_FILE: self._backbone_file, **(extra_files or {})}
        return push(
            self.projection,
            repo_id,
            private=private,
            token=token,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
            card=card,
            overwrite_card=overwrite_card,
            extra_files=extra_files,
        )

    def _check_stored(self) -> None:
        if self.settles:
            raise ProjectionFormatError(
                "this adapter has no projection to store: it settles on every clip anew. Store "
                "the one it finds on a clip, adapter.settle(clip), or fit one on many clips: "
                f"cosettle-adapter fit --backbone {self.backbone.row.name} --data clips/"
            )

    def geometry(
        self, height: int, width: int, *, size: Size | None = None, fit: Fit = "resize"
    ) -> Geometry:
        """Return how frames of ``height`` x ``width`` pixels become a grid of cells.

        Args:
            height: height of the frames in pixels.
            width: width of the frames in pixels.
            size: as in :meth:`forward`.
            fit: as in :meth:`forward`.
        """
        return plan_geometry(
            height,
            width,
            patch=self.backbone.patch,
            stride=self.backbone.stride,
            size=size,
            fit=fit,
        )

    def preprocess(self, frames: Any, *, size: Size | None = None, fit: Fit = "resize") -> Tensor:
        """Resize and normalise frames into what the backbone takes.

        Args:
            frames: as in :meth:`forward`, at most one leading dimension.
            size: as in :meth:`forward`.
            fit: as in :meth:`forward`.

        Returns:
            ``(T, 3, H', W')`` float32 on the adapter's device, normalised with the registry
            row's mean and standard deviation.
        """
        frames = as_frames(frames)
        frames = frames if frames.ndim == 4 else rearrange(frames, "c h w -> 1 c h w")
        geometry = self.geometry(frames.shape[-2], frames.shape[-1], size=size, fit=fit)
        return self._normalize(frames, geometry)

    @overload
    def forward(
        self,
        frames: Any,
        *,
        size: Size | None = ...,
        fit: Fit = ...,
        batch_size: int = ...,
        normalize: bool = ...,
        return_backbone: Literal[False] = ...,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        frames: Any,
        *,
        size: Size | None = ...,
        fit: Fit = ...,
        batch_size: int = ...,
        normalize: bool = ...,
        return_backbone: Literal[True],
    ) -> tuple[Tensor, Tensor]: ...

    def forward(
        self,
        frames: Any,
        *,
        size: Size | None = None,
        fit: Fit = "resize",
        batch_size: int = DEFAULT_BATCH_SIZE,
        normalize: bool = False,
        return_backbone: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return temporally consistent patch features.

        Args:
            frames: ``(T, 3, H, W)``, ``(B, T, 3, H, W)`` or ``(3, H, W)``, RGB, uint8 in
                [0, 255] or floating point in [0, 1], not normalised; NumPy ``(T, H, W, 3)``
                arrays and PIL images are taken as well.
            size: what frames are resized to: ``None`` keeps their size, an integer sets the
                shorter side, a pair sets ``(height, width)`` exactly.
            fit: what happens to sides that are not whole patches: ``resize`` rounds each to the
                nearest, ``pad`` keeps the aspect and repeats the bottom and right edge.
            batch_size: frames a forward pass; bounds memory and does not change the result.
            normalize: scale every cell's feature to unit length.
            return_backbone: return the tokens the projection read as well.

        Returns:
            Features ``(T, C, h, w)`` with the leading dimensions of ``frames``; or
            ``(backbone, features)`` if ``return_backbone``. Where the adapter ``settles``, each
            clip by its own T frames, in the order they have.

        Raises:
            FrameError: frames of another shape, range or dtype, or none at all.
            GeometryError: frames smaller than a patch, or a size that does not fit the patch.
            ValueError: ``batch_size`` below 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        frames, leading = pack([as_frames(frames)], "* c h w")
        geometry = self.geometry(frames.shape[-2], frames.shape[-1], size=size, fit=fit)
        kept: list[Tensor] = []
        projected: list[Tensor] = []
        for batch in frames.split(batch_size):
            tokens, features = self._encode(batch, geometry)
            projected.append(features if self.settles else self._finished(features, normalize))
            if return_backbone:
                kept.append(tokens)
        flat = torch.cat(projected)
        if self.settles:
            length = leading[0][-1] if leading[0] else 1
            clips = rearrange(flat, "(b t) c h w -> b t c h w", t=length)
            flat = torch.cat([settle_clip(clip) for clip in clips])
            flat = self._finished(flat, normalize)
        maps: Tensor = unpack(flat, leading, "* c h w")[0]
        if not return_backbone:
            return maps
        return unpack(torch.cat(kept), leading, "* c h w")[0], maps

    if TYPE_CHECKING:
        # nn.Module's own returns Any; callers get forward's overloads.
        __call__ = forward

    def stream(
        self,
        source: Any,
        *,
        select: FrameSelection | None = None,
        batch_size: int = DEFAULT_BATCH_SIZE,
        size: Size | None = None,
        fit: Fit = "resize",
        skip: int = 0,
        normalize: bool = False,
        return_backbone: bool = False,
        settle: bool | None = None,
        forgetting: float = 1.0,
        temporal_fusion: FusionMode | None = None,
        **moved: Any,
    ) -> Iterator[FeatureChunk]:
        """Yield the features of a video of any length at constant memory.

        Args:
            source: a video file, a folder or glob of images, an array, or an iterator of frames.
            select: which frames; all by default.
            batch_size: frames a chunk.
            size: as in :meth:`forward`.
            fit: as in :meth:`forward`.
            skip: pass over the first ones of those kept without encoding them, to go on where
                an earlier stream ended.
            normalize: as in :meth:`forward`.
            return_backbone: fill ``chunk.backbone``.
            settle: settle every frame by the statistics of the frames up to it, which is all a
                live stream has; by default as ``settles`` says. The first frames are hardly
                changed beyond being centred. Where the whole clip is there, :meth:`settle` on it
                first treats all frames alike.
            forgetting: with ``settle``, by what earlier frames are multiplied when one arrives;
                below 1 for streams that change: 0.99 remembers about 100 frames.
            temporal_fusion: average every patch with its matches in neighbouring frames, after
                settling (:class:`~cosettle_adapter.correspondence.TemporalFusion`):
                ``"symmetric"`` takes frames of both sides, so that chunks come up to three frames
                later; ``"causal"`` past ones alone. Fused features carry no gradients.
            **moved: fields of :class:`FrameSelection`, as in version 0.1; deprecated.

        Yields:
            :class:`FeatureChunk` in order; decoding runs ahead in a thread.

        Raises:
            FrameError: nothing to read, or frames that cannot be used.
            TruncatedVideoError: the video breaks off; everything readable was yielded before.
            ValueError: ``forgetting`` outside (0, 1], or another ``temporal_fusion``.
        """
        settler = None
        if self.settles if settle is None else settle:
            settler = Settler(self.width, forgetting=forgetting)
        fusion = None if temporal_fusion is None else TemporalFusion(temporal_fusion)
        chunks = open_frames(source, selected(select, moved), skip=skip, chunk_size=batch_size)
        return self._stream(
            chunks,
            size=size,
            fit=fit,
            normalize=normalize,
            return_backbone=return_backbone,
            settler=settler,
            fusion=fusion,
        )

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
        **moved: Any,
    ) -> CoSettleAdapter:
        """Return an adapter refined on one clip, by that clip's own statistics.

        One pass over the clip: its mean token is taken off, and directions in which corresponding
        patches of adjacent frames differ are damped, the less the fewer of them there were (see
        :class:`~cosettle_adapter.closed_form.Settler`). It takes seconds beyond the pass, on any
        CPU. This adapter is left as it was; the new one shares its backbone and has it as
        :attr:`unsettled`. A settled adapter settles from there again, not on top.

        The new projection can be saved like any other. On an ``affine`` one (all closed forms)
        or none, it is again a single ``affine`` one; other heads get a further layer.

        Args:
            source: as in :meth:`stream`, in frame order: the clip whose features are wanted.
            select: which frames; best as the features will be.
            batch_size: frames a forward pass.
            size: as in :meth:`forward`; best what the features will be computed at.
            fit: as in :meth:`forward`.
            ridge: damping, in units of the mean temporal variance; the larger, the gentler, and
                infinity only centres.
            prior_pairs: number of corresponding patches at which the clip counts as much as the
                projection it already has.
            **moved: fields of :class:`FrameSelection`, as in version 0.1; deprecated.

        Raises:
            FrameError: nothing to read, or frames that cannot be used.
            ValueError: ``ridge`` or ``prior_pairs`` out of range.
        """
        base = self.unsettled
        settler = Settler(base.width, ridge=ridge, prior_pairs=prior_pairs)
        frames = open_frames(source, selected(select, moved), chunk_size=batch_size)
        try:
            for chunk in prefetch(frames):
                geometry = base.geometry(*chunk.frames.shape[-2:], size=size, fit=fit)
                settler.update(base._encode(chunk.frames, geometry)[1])
        except TruncatedVideoError as error:
            if not settler.frames:
                raise
            logger.warning("settled on the readable part of the clip: %s", error)
        named = isinstance(source, str | Path)
        record = {
            "method": "settled on one clip: centred, then damped by the clip's own intra-video "
            "covariance, after the projection under base",
            "clip": Path(source).name if named else type(source).__name__,
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
        """The adapter this one was settled from; itself, if it was not settled (or was loaded)."""
        if not self._unsettled:
            return self
        (base,) = self._unsettled
        base.projection.to(self.device)
        return base

    def _stream(
        self,
        chunks: Generator[FrameChunk, None, None],
        *,
        size: Size | None,
        fit: Fit,
        normalize: bool,
        return_backbone: bool,
        settler: Settler | None,
        fusion: TemporalFusion | None,
    ) -> Iterator[FeatureChunk]:
        if self.device.type == "cuda":
            chunks = pinned(chunks)

        def encoded() -> Iterator[tuple[FeatureChunk, Tensor]]:
            for chunk in prefetch(chunks):
                geometry = self.geometry(*chunk.frames.shape[-2:], size=size, fit=fit)
                tokens, features = self._encode(chunk.frames, geometry)
                if settler is not None:
                    features = settler.settle(features)
                found = FeatureChunk(
                    features=features,
                    timestamps=chunk.timestamps,
                    geometry=geometry,
                    start=chunk.start,
                    backbone=tokens if return_backbone else None,
                )
                yield found, tokens

        found_chunks: Iterator[FeatureChunk] = (found for found, _ in encoded())
        if fusion is not None:
            guided = ((found, self._guide(tokens)) for found, tokens in encoded())
            found_chunks = _fused(guided, fusion)
        for found in found_chunks:
            features = self._finished(found.features, normalize)
            yield dataclasses.replace(found, features=features)

    def _guide(self, tokens: Tensor) -> Tensor:
        """What temporal fusion takes its matches from, ``(N, G, h, w)``."""
        layers = map(self.backbone.block, self.config.layers)
        return fusion_guide(tokens, [self.backbone.widths[layer] for layer in layers])

    def _encode(self, frames: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
        """Tokens and features, both ``(N, C, h, w)``, of frames that fit in one pass."""
        return self._encode_images(self._normalize(frames, geometry))

    def _encode_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and features of what :meth:`preprocess` returns."""
        read = self.backbone.intermediate_tokens(images, self.config.layers, norm=self.config.norm)
        tokens = read[0] if len(read) == 1 else torch.cat(read, dim=1)
        return tokens, self.projection(tokens)

    def _finished(self, features: Tensor, normalize: bool) -> Tensor:
        return (F.normalize(features, dim=1) if normalize else features).to(self.dtype)

    def _normalize(self, frames: Tensor, geometry: Geometry) -> Tensor:
        images = apply_geometry(frames.to(self.device, non_blocking=True), geometry)
        full_scale = 1.0 if frames.is_floating_point() else 255.0
        mean, std = (
            rearrange(torch.tensor(each, dtype=torch.float64), "c -> c 1 1")
            for each in (self.backbone.row.mean, self.backbone.row.std)
        )
        # bytes are multiplied as they are, which saves a float copy of them
        images = images.float() if images.is_floating_point() else images
        scale, shift = (
            each.to(images.device, torch.float32) for each in (1 / (full_scale * std), mean / std)
        )
        return (images * scale).sub_(shift)


def _fused(
    chunks: Iterator[tuple[FeatureChunk, Tensor]], fusion: TemporalFusion
) -> Iterator[FeatureChunk]:
    """Fuse the features of chunks, each given with its guide; a chunk waits for its last frame."""
    waiting: collections.deque[FeatureChunk] = collections.deque()
    ready: list[Tensor] = []

    def whole() -> Iterator[FeatureChunk]:
        while waiting and len(ready) >= (frames := len(waiting[0].timestamps)):
            features = torch.stack(ready[:frames])
            del ready[:frames]
            yield dataclasses.replace(waiting.popleft(), features=features)

    broken: TruncatedVideoError | None = None
    try:
        for chunk, guide in chunks:
            if waiting and waiting[-1].geometry.grid != chunk.geometry.grid:
                ready.extend(fusion.flush())
            ready.extend(fusion.push(chunk.features, guide))
            # without the features, which would be held for nothing
            waiting.append(dataclasses.replace(chunk, features=chunk.features.new_empty(0)))
            yield from whole()
    except TruncatedVideoError as error:
        broken = error
    ready.extend(fusion.flush())
    yield from whole()
    if broken is not None:
        raise broken


def _short(fingerprint: str) -> str:
    return fingerprint.partition(":")[2][:12] or fingerprint
