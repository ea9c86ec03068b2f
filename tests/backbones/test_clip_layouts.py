from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable

import open_clip
import pytest
import timm
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from cosettle_adapter.backbones import BackboneRow, build_backbone
from cosettle_adapter.backbones.layouts import LAYOUTS, to_timm
from cosettle_adapter.errors import CorruptWeightsError

WIDTH, HEADS, DEPTH, PATCH, SIDE = 32, 2, 2, 8, 32
CELLS = (SIDE // PATCH) ** 2
Tensors = dict[str, Tensor]


def row(architecture: str, **options: object) -> BackboneRow:
    size = {
        "img_size": SIDE,
        "patch_size": PATCH,
        "embed_dim": WIDTH,
        "depth": DEPTH,
        "num_heads": HEADS,
        "mlp_ratio": 2.0,
    }
    return BackboneRow(
        name="tiny",
        family="random",
        architecture=architecture,
        patch=PATCH,
        width=WIDTH,
        depth=DEPTH,
        image_size=SIDE,
        licence="MIT",
        options={**size, **options},
        ignored=(),
    )


def timm_names(tensors: Tensors) -> Tensors:
    return to_timm(dict(tensors), row(CLIP))


def check(
    tower: BackboneRow, tensors: Tensors, reference: Callable[[Tensor], Tensor], **options: bool
) -> None:
    """The patch tokens of a converted file are the reference's, and exist at another size."""
    backbone = build_backbone(tower, to_timm(dict(tensors), tower), fingerprint="")
    images = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        expected = rearrange(reference(images), "b (h w) c -> b c h w", h=SIDE // PATCH)
    tokens = backbone.patch_tokens(images, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-5)
    other = backbone.patch_tokens(torch.randn(1, 3, 2 * PATCH, 5 * PATCH))
    assert other.shape == (1, WIDTH, 2, 5)


CLIP = "vit_base_patch16_clip_224"
QUICK_CLIP = "vit_base_patch16_clip_quickgelu_224"

# --- OpenAI and open_clip


def openai_tower(*, quick_gelu: bool = False, **options: object) -> open_clip.transformer:
    tower = open_clip.transformer.VisionTransformer(
        image_size=SIDE,
        patch_size=PATCH,
        width=WIDTH,
        layers=DEPTH,
        heads=HEADS,
        mlp_ratio=2.0,
        output_dim=16,
        act_layer=open_clip.transformer.QuickGELU if quick_gelu else nn.GELU,
        **options,
    ).eval()
    for parameter in tower.parameters():
        parameter.data = parameter + 0.1 * torch.randn_like(parameter)
    return tower


def whole_model(tower: nn.Module, prefix: str = "visual.") -> Tensors:
    """A tower's tensors with a text tower beside them, as in a published file."""
    text = {
        "transformer.resblocks.0.attn.in_proj_weight": torch.zeros(12, 4),
        "transformer.resblocks.0.ln_1.weight": torch.zeros(4),
        "positional_embedding": torch.zeros(77, 4),
        "token_embedding.weight": torch.zeros(9, 4),
        "ln_final.weight": torch.zeros(4),
        "text_projection": torch.zeros(4, 16),
        "logit_scale": torch.zeros(()),
        "input_resolution": torch.tensor(224),
    }
    return {**text, **{prefix + name: tensor for name, tensor in tower.state_dict().items()}}


@pytest.mark.parametrize(
    ("tower", "options"),
    [
        ({"quick_gelu": True}, {"act_layer": "quick_gelu"}),
        ({"ls_init_value": 0.1}, {"init_values": 0.1}),
        ({"no_ln_pre": True, "pool_type": "avg"}, {"pre_norm": False}),
    ],
)
@pytest.mark.parametrize("norm", [True, False])
def test_openai(tower: dict[str, bool], options: dict[str, object], norm: bool) -> None:
    model = openai_tower(**tower)

    def reference(images: Tensor) -> Tensor:
        tokens: Tensor = model.forward_intermediates(
            images, normalize_intermediates=norm, output_fmt="NLC", intermediates_only=True
        )["image_intermediates"][-1]
        return tokens

    check(row(CLIP, **options), whole_model(model), reference, norm=norm)


def test_openai_without_what_stands_beside_it() -> None:
    model = openai_tower()
    alone = timm_names(model.state_dict())
    for prefix in ("visual.", "module.visual.", "model.clip.visual."):
        found = timm_names(whole_model(model, prefix))
        assert found.keys() == alone.keys()
        assert all(torch.equal(found[name], alone[name]) for name in alone)


def test_cocas_norm_is_not_the_patch_tokens() -> None:
    # As wide as the tower, so that shapes could not tell.
    model = openai_tower(attentional_pool=True, attn_pooler_heads=2, attn_pooler_queries=3)
    wide = {**whole_model(model), "visual.ln_post.weight": torch.ones(WIDTH)}

    def reference(images: Tensor) -> Tensor:
        tokens: Tensor = model.forward_intermediates(
            images, output_fmt="NLC", intermediates_only=True
        )["image_intermediates"][-1]
        return tokens

    tower = dataclasses.replace(row(CLIP, final_norm=False), final_norm=False)
    check(tower, wide, reference)


def test_modified_resnet() -> None:
    model = open_clip.modified_resnet.ModifiedResNet([3, 4, 6, 3], 16, 8, image_size=32, width=64)
    for name, tensor in model.eval().state_dict().items():
        if name.endswith(("running_mean", "bn3.weight")):
            tensor.copy_(torch.rand_like(tensor))
    twin = timm.create_model("resnet50_clip_gap", num_classes=0).eval()
    twin.load_state_dict(timm_names(whole_model(model)), strict=True)
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        theirs = model.forward_intermediates(images, intermediates_only=True)
        ours = twin.forward_intermediates(images, intermediates_only=True)
    for mine, other in zip(ours[1:], theirs["image_intermediates"][1:], strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["convnext_atto", "fastvit_t8", "test_vit"])
def test_trunks_keep_timms_names_and_lose_their_heads(architecture: str) -> None:
    tower = open_clip.timm_model.TimmModel(architecture, embed_dim=8, pool="", proj=None)
    tower.head.proj = nn.Linear(8, 8)
    converted = timm_names(whole_model(tower))
    bare = timm.create_model(architecture, num_classes=0, global_pool="").state_dict()
    assert {name: tensor.shape for name, tensor in converted.items()} == {
        name: tensor.shape for name, tensor in bare.items()
    }


# --- Hugging Face: a forward pass written from the tensors alone


def random_tensors(**shapes: tuple[int, ...]) -> Tensors:
    return {
        name: torch.randn(shape) * 0.2 + float("norm" in name and name.endswith("weight"))
        for name, shape in shapes.items()
    }


def layer(tensors: Tensors, name: str, tokens: Tensor) -> Tensor:
    return F.linear(tokens, tensors[f"{name}.weight"], tensors[f"{name}.bias"])


def norm(tensors: Tensors, name: str, tokens: Tensor, eps: float) -> Tensor:
    return F.layer_norm(tokens, (WIDTH,), tensors[f"{name}.weight"], tensors[f"{name}.bias"], eps)


def attend(tensors: Tensors, names: tuple[str, str, str, str], tokens: Tensor) -> Tensor:
    query, key, value = (
        rearrange(layer(tensors, name, tokens), "b n (heads d) -> b heads n d", heads=HEADS)
        for name in names[:3]
    )
    scores = torch.einsum("bhid,bhjd->bhij", query, key) / (WIDTH // HEADS) ** 0.5
    mixed = torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), value)
    return layer(tensors, names[3], rearrange(mixed, "b heads n d -> b n (heads d)"))


def patches(images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    cells = rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=PATCH, q=PATCH)
    return F.linear(cells, rearrange(weight, "o c p q -> o (c p q)"), bias)


def quick_gelu(tokens: Tensor) -> Tensor:
    return tokens * torch.sigmoid(1.702 * tokens)


gelu_tanh = functools.partial(F.gelu, approximate="tanh")


def linear(name: str, outputs: int = WIDTH, inputs: int = WIDTH) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def vector(name: str) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (WIDTH,), f"{name}.bias": (WIDTH,)}


def hf_clip(*, siglip: bool) -> Tensors:
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.patch_embedding.weight": (WIDTH, 3, PATCH, PATCH),
        "embeddings.position_embedding.weight": (CELLS + (not siglip), WIDTH),
        **vector("post_layernorm"),
    }
    if siglip:
        shapes |= {"embeddings.patch_embedding.bias": (WIDTH,)}
    else:
        shapes |= {"embeddings.class_embedding": (WIDTH,), **vector("pre_layrnorm")}
    for index in range(DEPTH):
        block = f"encoder.layers.{index}"
        shapes |= {
            **vector(f"{block}.layer_norm1"),
            **vector(f"{block}.layer_norm2"),
            **linear(f"{block}.mlp.fc1", 2 * WIDTH),
            **linear(f"{block}.mlp.fc2", WIDTH, 2 * WIDTH),
        }
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= linear(f"{block}.self_attn.{part}")
    return random_tensors(**shapes)


def hf_clip_tokens(images: Tensor, tensors: Tensors, *, siglip: bool) -> Tensor:
    eps, act = (1e-6, gelu_tanh) if siglip else (1e-5, quick_gelu)
    tokens = patches(
        images,
        tensors["embeddings.patch_embedding.weight"],
        tensors.get("embeddings.patch_embedding.bias"),
    )
    if not siglip:
        token = tensors["embeddings.class_embedding"].expand(len(images), 1, -1)
        tokens = torch.cat([token, tokens], dim=1)
    tokens = tokens + tensors["embeddings.position_embedding.weight"]
    if not siglip:
        tokens = norm(tensors, "pre_layrnorm", tokens, eps)
    for index in range(DEPTH):
        block = f"encoder.layers.{index}"
        names = tuple(
            f"{block}.self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "out_proj")
        )
        tokens = tokens + attend(tensors, names, norm(tensors, f"{block}.layer_norm1", tokens, eps))
        hidden = act(
            layer(
                tensors,
                f"{block}.mlp.fc1",
                norm(tensors, f"{block}.layer_norm2", tokens, eps),
            )
        )
        tokens = tokens + layer(tensors, f"{block}.mlp.fc2", hidden)
    return norm(tensors, "post_layernorm", tokens, eps)[:, int(not siglip) :]


def under(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def beside(tensors: Tensors) -> Tensors:
    """A Hugging Face CLIP or SigLIP with its text tower."""
    return {
        **under("vision_model.", tensors),
        "text_model.encoder.layers.0.self_attn.q_proj.weight": torch.zeros(4, 4),
        "text_model.embeddings.position_ids": torch.arange(3),
        "vision_model.embeddings.position_ids": torch.arange(CELLS),
        "visual_projection.weight": torch.zeros(4, WIDTH),
        "logit_scale": torch.zeros(()),
    }


@pytest.mark.parametrize("whole", [True, False])
def test_hugging_face_clip(whole: bool) -> None:
    tensors = hf_clip(siglip=False)
    file = beside(tensors) if whole else tensors
    check(row(QUICK_CLIP), file, lambda images: hf_clip_tokens(images, tensors, siglip=False))


@pytest.mark.parametrize("whole", [True, False])
def test_hugging_face_siglip(whole: bool) -> None:
    tensors = hf_clip(siglip=True)
    head = {"head.probe": torch.zeros(1, 1, WIDTH), "head.mlp.fc1.weight": torch.zeros(4, WIDTH)}
    file = beside({**tensors, **head}) if whole else {**tensors, **head}
    check(
        row("vit_base_patch16_siglip_224", act_layer="gelu_tanh"),
        file,
        lambda images: hf_clip_tokens(images, tensors, siglip=True),
    )


VIT_BLOCK = {"norm1": "layernorm_before", "norm2": "layernorm_after"}
VIT_BLOCK |= {"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}


def hf_vit(*, dinov2: bool, registers: int = 0, swiglu: bool = False) -> Tensors:
    """Tensors of ``Dinov2Model``, ``Dinov2WithRegistersModel`` or ``ViTModel``."""
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.cls_token": (1, 1, WIDTH),
        "embeddings.mask_token": (1, WIDTH),
        "embeddings.position_embeddings": (1, CELLS + 1, WIDTH),
        "embeddings.patch_embeddings.projection.weight": (WIDTH, 3, PATCH, PATCH),
        "embeddings.patch_embeddings.projection.bias": (WIDTH,),
        **vector("layernorm"),
    }
    if registers:
        shapes |= {"embeddings.register_tokens": (1, registers, WIDTH)}
    for index in range(DEPTH):
        block = f"encoder.layer.{index}"
        mlp = ("mlp.weights_in", "mlp.weights_out") if swiglu else ("mlp.fc1", "mlp.fc2")
        named = {
            **vector("norm1"),
            **vector("norm2"),
            **linear(mlp[0], (4 if swiglu else 2) * WIDTH),
            **linear(mlp[1], WIDTH, 2 * WIDTH),
            **linear("attention.output.dense"),
        }
        for part in ("query", "key", "value"):
            named |= linear(f"attention.attention.{part}")
        if dinov2:
            named |= {"layer_scale1.lambda1": (WIDTH,), "layer_scale2.lambda1": (WIDTH,)}
        for name, shape in named.items():
            module, _, leaf = name.rpartition(".")
            module = module if dinov2 else VIT_BLOCK.get(module, module)
            shapes[f"{block}.{module}.{leaf}"] = shape
    return random_tensors(**shapes)


def hf_vit_tokens(images: Tensor, tensors: Tensors, *, dinov2: bool, eps: float = 1e-6) -> Tensor:
    tokens = patches(
        images,
        tensors["embeddings.patch_embeddings.projection.weight"],
        tensors["embeddings.patch_embeddings.projection.bias"],
    )
    token = tensors["embeddings.cls_token"].expand(len(images), 1, -1)
    tokens = torch.cat([token, tokens], dim=1) + tensors["embeddings.position_embeddings"]
    registers = tensors.get("embeddings.register_tokens", torch.zeros(1, 0, WIDTH))
    parts = [tokens[:, :1], registers.expand(len(images), -1, -1), tokens[:, 1:]]
    tokens = torch.cat(parts, dim=1)
    for index in range(DEPTH):
        block = f"encoder.layer.{index}"
        named = {
            name: f"{block}.{name if dinov2 else VIT_BLOCK[name]}"
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2")
        }
        heads = tuple(f"{block}.attention.attention.{part}" for part in ("query", "key", "value"))
        mixed = attend(
            tensors,
            (*heads, f"{block}.attention.output.dense"),
            norm(tensors, named["norm1"], tokens, eps),
        )
        tokens = tokens + mixed * tensors.get(f"{block}.layer_scale1.lambda1", torch.ones(1))
        normed = norm(tensors, named["norm2"], tokens, eps)
        if f"{block}.mlp.weights_in.weight" in tensors:
            gate, hidden = layer(tensors, f"{block}.mlp.weights_in", normed).chunk(2, dim=-1)
            update = layer(tensors, f"{block}.mlp.weights_out", F.silu(gate) * hidden)
        else:
            update = layer(
                tensors, named["mlp.fc2"], F.gelu(layer(tensors, named["mlp.fc1"], normed))
            )
        tokens = tokens + update * tensors.get(f"{block}.layer_scale2.lambda1", torch.ones(1))
    return norm(tensors, "layernorm", tokens, eps)[:, 1 + registers.shape[1] :]


DINOV2, GIANT = "vit_base_patch14_dinov2", "vit_giant_patch14_dinov2"
REGISTERS = "vit_base_patch14_reg4_dinov2"


@pytest.mark.parametrize("prefix", ["", "dinov2.", "backbone."])
@pytest.mark.parametrize(
    ("architecture", "registers", "options"),
    [(DINOV2, 0, {}), (REGISTERS, 4, {}), (GIANT, 0, {"mlp_ratio": 4.0})],
)
def test_hugging_face_dinov2(
    architecture: str, registers: int, options: dict[str, float], prefix: str
) -> None:
    tensors = hf_vit(dinov2=True, registers=registers, swiglu=architecture == GIANT)
    file = {**under(prefix, tensors), "classifier.weight": torch.zeros(9, WIDTH)}
    check(
        row(architecture, **options),
        file,
        lambda images: hf_vit_tokens(images, tensors, dinov2=True),
    )


def test_registers_come_out_as_timm_converts_dinov2s_own_file() -> None:
    tensors = hf_vit(dinov2=True, registers=4)
    converted = timm_names(tensors)
    own = {  # the names of the official release, of which timm has a conversion
        "cls_token": tensors["embeddings.cls_token"],
        "pos_embed": tensors["embeddings.position_embeddings"],
        "register_tokens": tensors["embeddings.register_tokens"],
        "mask_token": tensors["embeddings.mask_token"],
    }
    tower = row(REGISTERS)
    model = timm.create_model(tower.architecture, num_classes=0, **tower.options)
    expected = timm.models.vision_transformer.checkpoint_filter_fn(own, model)
    assert set(expected) == {"reg_token", "cls_token", "pos_embed"}
    for name, tensor in expected.items():
        torch.testing.assert_close(converted[name], tensor, atol=0, rtol=0)


@pytest.mark.parametrize("prefix", ["", "vit."])
def test_hugging_face_vit_and_mae(prefix: str) -> None:
    tensors = hf_vit(dinov2=False)
    file = {
        **under(prefix, tensors),
        prefix + "pooler.dense.weight": torch.zeros(WIDTH, WIDTH),
        "decoder.decoder_layers.0.layernorm_before.weight": torch.zeros(4),
        "classifier.bias": torch.zeros(9),
    }
    check(
        row("vit_base_patch16_224"),
        file,
        lambda images: hf_vit_tokens(images, tensors, dinov2=False),
    )


# What transformers 5 calls the same modules in memory, though not in the files it writes.
IN_MEMORY = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "mlp.weights_out": "mlp.down_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}


@pytest.mark.parametrize("dinov2", [True, False])
def test_state_dicts_of_transformers_5(dinov2: bool) -> None:
    file = hf_vit(dinov2=dinov2, swiglu=dinov2)
    memory: Tensors = {}
    for name, tensor in file.items():
        for old, new in IN_MEMORY.items():
            name = name.replace(f".{old}.", f".{new}.")
        name = name if dinov2 else name.replace("encoder.layer.", "layers.")
        if ".mlp.weights_in." in name:
            gate, up = tensor.chunk(2)
            memory[name.replace("weights_in", "gate_proj")] = gate
            memory[name.replace("weights_in", "up_proj")] = up
        else:
            memory[name] = tensor
    assert memory.keys() != file.keys()
    expected, found = timm_names(file), timm_names(memory)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# --- whatever the layout

EXAMPLES: dict[str, Callable[[], Tensors]] = {
    "OpenAI CLIP or open_clip, ViT": lambda: whole_model(openai_tower()),
    "open_clip CoCa": lambda: whole_model(openai_tower(attentional_pool=True, attn_pooler_heads=2)),
    "Hugging Face CLIP": lambda: hf_clip(siglip=False),
    "Hugging Face SigLIP": lambda: hf_clip(siglip=True),
    "Hugging Face DINOv2": lambda: hf_vit(dinov2=True, registers=4),
    "Hugging Face ViT or MAE": lambda: hf_vit(dinov2=False),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_marks_tell_layouts_apart(name: str) -> None:
    tensors = EXAMPLES[name]()
    marked = [
        layout.name
        for layout in LAYOUTS
        if any(tensor == layout.mark or tensor.endswith("." + layout.mark) for tensor in tensors)
    ]
    assert marked[0] == name
    assert set(marked[1:]) <= {"OpenAI CLIP or open_clip, ViT"}  # CoCa's tower is one with a pool


def test_timms_own_names_have_no_mark() -> None:
    for architecture in ("vit_tiny_patch16_224", "convnext_atto", "vit_base_patch16_siglip_224"):
        with torch.device("meta"):
            names = timm.create_model(architecture).state_dict()
        assert not [
            layout.mark
            for layout in LAYOUTS
            if any(name == layout.mark or name.endswith("." + layout.mark) for name in names)
        ]


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype_is_the_files(name: str, dtype: torch.dtype) -> None:
    tensors = {key: tensor.to(dtype) for key, tensor in EXAMPLES[name]().items()}
    converted = timm_names(tensors)
    assert {tensor.dtype for tensor in converted.values()} == {dtype}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_file_is_left_as_it_was(name: str) -> None:
    tensors = EXAMPLES[name]()
    before = {key: (tensor, tensor.clone()) for key, tensor in tensors.items()}
    timm_names(tensors)
    assert tensors.keys() == before.keys()
    for key, (tensor, copy) in before.items():
        assert tensors[key] is tensor
        assert torch.equal(tensor, copy)


@pytest.mark.parametrize(
    ("name", "architecture", "extra"),
    [
        ("OpenAI CLIP or open_clip, ViT", CLIP, "visual.transformer.resblocks.1.attn.ln_q.weight"),
        ("OpenAI CLIP or open_clip, ViT", CLIP, "visual.surprise"),
        ("Hugging Face CLIP", CLIP, "encoder.layers.0.self_attn.gate"),
        ("Hugging Face SigLIP", "vit_base_patch16_siglip_224", "embeddings.class_embedding_2"),
        ("Hugging Face DINOv2", REGISTERS, "encoder.layer.1.mlp.extra.weight"),
        ("Hugging Face ViT or MAE", "vit_base_patch16_224", "embeddings.distillation_token"),
    ],
)
def test_what_is_not_recognised_is_listed_under_its_own_name(
    name: str, architecture: str, extra: str
) -> None:
    tower, tensors = row(architecture), EXAMPLES[name]()
    build_backbone(tower, timm_names(tensors), fingerprint="")
    converted = timm_names({**tensors, extra: torch.zeros(1)})
    with pytest.raises(CorruptWeightsError, match=rf"unexpected[^;]*{re.escape(extra)}"):
        build_backbone(tower, converted, fingerprint="")


def test_a_query_without_its_key_is_listed() -> None:
    tensors = hf_clip(siglip=False)
    del tensors["encoder.layers.1.self_attn.k_proj.bias"]
    with pytest.raises(CorruptWeightsError) as caught:
        build_backbone(row(QUICK_CLIP), timm_names(tensors), fingerprint="")
    assert re.search(r"missing[^;]*blocks\.1\.attn\.qkv\.bias", str(caught.value))
    assert re.search(r"unexpected[^;]*blocks\.1\.attn\.q\.bias", str(caught.value))


def test_two_towers_in_one_file() -> None:
    tower = openai_tower().state_dict()
    with pytest.raises(CorruptWeightsError, match=r"found 2 \('student\.', 'teacher\.'\); save"):
        timm_names({**under("student.", tower), **under("teacher.", tower)})


parts = st.text("abcdefgh_0123", min_size=1, max_size=6)


@settings(max_examples=20, deadline=None)
@given(prefix=st.lists(parts, max_size=3).map(lambda names: "".join(f"{n}." for n in names)))
def test_whatever_stands_before_the_names(prefix: str) -> None:
    tensors = hf_clip(siglip=False)
    expected, found = timm_names(tensors), timm_names(under(prefix, tensors))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
