from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor, nn

from dino_d2 import load_config
from dino_d2.checkpoint import DINOCheckpointer, from_published, to_published
from dino_d2.checkpoint.assumptions import EXTRA_STATE, Assumptions
from dino_d2.checkpoint.convert import COCO, ConversionError, detect_source, layout_of
from dino_d2.checkpoint.names import SOURCES

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
PER_LAYER = ["MODEL.DINO.SHARE_HEADS", "False"]
DETREX = [*PER_LAYER, "MODEL.DINO.POS_TEMPERATURE", "10000.0", "MODEL.DINO.POS_OFFSET", "-0.5"]


def resnet_config(*values: str) -> CfgNode:
    """A tiny DINO on detectron2's ResNet-18, whose names differ from torchvision's."""
    small = {
        "MODEL.WEIGHTS": "", "MODEL.DEVICE": "cpu", "MODEL.RESNETS.DEPTH": 18, "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
        "MODEL.DINO.HIDDEN_DIM": 32, "MODEL.DINO.NHEADS": 4, "MODEL.DINO.DIM_FEEDFORWARD": 16,
        "MODEL.DINO.ENC_LAYERS": 1, "MODEL.DINO.DEC_LAYERS": 2, "MODEL.DINO.NUM_QUERIES": 6,
        "MODEL.DINO.NUM_CLASSES": 91,
    }  # fmt: skip
    defaults = [str(part) for item in small.items() for part in item]
    return load_config(str(ROOT / "configs" / "dino_r50_4scale_12ep.yaml"), [*defaults, *values])


def randomised(model: nn.Module) -> nn.Module:
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn_like(tensor))
    return model


def published_by(source: str, *values: str) -> dict[str, Tensor]:
    """A checkpoint in the names of `source`, of a random model with its own config."""
    model = randomised(build_model(resnet_config(*values)))
    return to_published(model.state_dict(), source, model).state


RECIPE_OF = {  # a published file's names and shapes: the recipe that is the same model
    "DINO_4scale": "dino_r50_4scale_12ep",
    "DINO_5scale": "dino_r50_5scale_12ep",
    "DINO_4scale_swin": "dino_swinl_4scale_12ep",
    "detrex_dino_r50": "dino_r50_4scale_12ep",
    "detrex_dino_r50_5scale": "dino_r50_5scale_12ep",
    "detrex_dino_r101": "dino_r101_4scale_12ep",
    "detrex_dino_swin_t": "dino_swint_4scale_12ep",
    "detrex_dino_swin_s": "dino_swins_4scale_12ep",
    "detrex_dino_swin_b_384": "dino_swinb_4scale_12ep",
    "detrex_dino_swin_l_224": "dino_swinl224_4scale_12ep",
    "detrex_dino_swin_l_384": "dino_swinl_4scale_12ep",
    "detrex_dino_swin_l_384_5scale": "dino_swinl_5scale_12ep",
    "detrex_dino_convnext_t": "dino_convnextt_4scale_12ep",
    "detrex_dino_convnext_s": "dino_convnexts_4scale_12ep",
    "detrex_dino_convnext_b": "dino_convnextb_4scale_12ep",
    "detrex_dino_convnext_l": "dino_convnextl_4scale_12ep",
    "detrex_dino_vitdet_b": "dino_vitdetb_4scale_12ep",
    "detrex_dino_vitdet_l": "dino_vitdetl_4scale_12ep",
    "mmdet_dino_r50_4scale": "dino_r50_4scale_12ep",
    "mmdet_dino_5scale_swinl": "dino_swinl_5scale_12ep",
}
NEITHER_HERE_NOR_THERE = re.compile(r"neck\.(extra_)?convs\.\d\.conv\.bias|backbone\..+\.num_batches_tracked")  # mmdet


def without_memory(cfg: CfgNode, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A model whose weights take no memory and no time to be drawn."""
    cfg.MODEL.DEVICE = "meta"
    monkeypatch.setattr(torch, "linspace", partial(torch.linspace, device="cpu"))  # rates, which are read at once
    with torch.device("meta"):
        model = build_model(cfg)
    model.neck.to_empty(device="cpu")  # where conversion looks at values
    return model


def test_every_published_model_is_looked_at() -> None:
    assert {f"state_dict_{name}.json" for name in RECIPE_OF} == {path.name for path in GOLDEN.glob("state_dict_*.json")}


@pytest.mark.parametrize(("model_file", "recipe"), RECIPE_OF.items())
def test_every_published_name_maps_to_a_parameter_of_its_shape(
    model_file: str, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = json.loads((GOLDEN / f"state_dict_{model_file}.json").read_text())
    state = {
        name: torch.zeros((), device="meta" if name.startswith("backbone") else "cpu").expand(shape)
        for name, shape in shapes.items()
    }
    source = next((source for source in ("detrex", "mmdet") if source in model_file), "official")
    classes = 91 if source == "official" else 80
    values = {"official": [], "detrex": DETREX, "mmdet": PER_LAYER}[source]
    values = [*values, "MODEL.DINO.NUM_CLASSES", str(classes), "MODEL.TIMM.PRETRAINED", "False"]
    model = without_memory(load_config(str(ROOT / "configs" / f"{recipe}.yaml"), values), monkeypatch)
    assert detect_source(state) == source
    conversion = from_published(state, source, model)
    assert set(conversion.state) == set(model.state_dict())
    names = {n for name in model.state_dict() if name != EXTRA_STATE for n in SOURCES[source](name, layout_of(model))}
    differing = set(shapes) ^ names
    assert not differing or source == "mmdet"
    assert all(NEITHER_HERE_NOR_THERE.fullmatch(name) for name in differing)


@pytest.mark.parametrize("source", ["official", "detrex", "mmdet"])
def test_way_there_and_back_is_bit_for_bit(source: str) -> None:
    values = {"official": [], "detrex": DETREX, "mmdet": PER_LAYER}[source]
    state = published_by(source, *values)
    assert detect_source(state) == source
    model = build_model(resnet_config(*values))
    conversion = from_published(state, source, model)
    assert model.load_state_dict(conversion.state).missing_keys == []
    back = to_published(model.state_dict(), source, model).state
    assert set(back) == set(state)
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_score_threshold_that_is_lost_on_the_way_is_said() -> None:
    model = build_model(resnet_config())
    model.assumptions = replace(model.assumptions, score_threshold=0.25)
    assert to_published(model.state_dict(), "official", model).notes == [
        "score threshold 0.250: official weights have no place for it"
    ]


def test_mmdetections_names_are_those_of_its_source_files() -> None:
    names = published_by("mmdet", *PER_LAYER)
    for name in (
        "backbone.conv1.weight", "backbone.layer2.0.downsample.1.running_var", "neck.convs.0.gn.weight",
        "neck.extra_convs.0.conv.weight", "level_embed", "encoder.layers.0.self_attn.sampling_offsets.weight",
        "encoder.layers.0.ffn.layers.0.0.weight", "encoder.layers.0.ffn.layers.1.bias",
        "encoder.layers.0.norms.1.weight",
        "decoder.layers.1.self_attn.attn.in_proj_weight", "decoder.layers.1.cross_attn.value_proj.weight",
        "decoder.layers.1.norms.2.bias", "decoder.norm.weight", "decoder.ref_point_head.layers.1.weight",
        "memory_trans_fc.weight", "memory_trans_norm.bias", "query_embedding.weight",
        "dn_query_generator.label_embedding.weight", "bbox_head.cls_branches.2.weight",
        "bbox_head.reg_branches.2.4.bias",
    ):  # fmt: skip
        assert name in names


def test_mmdetections_convolutions_without_bias_get_zeros() -> None:
    state = {n: v for n, v in published_by("mmdet", *PER_LAYER).items() if not re.match(r"neck.*\.conv\.bias", n)}
    conversion = from_published(state, "mmdet", build_model(resnet_config(*PER_LAYER)))
    assert not conversion.state["neck.projections.0.0.bias"].any()
    assert any("zero" in note for note in conversion.notes)


def test_merged_patches_of_mmdetections_swin_are_put_in_the_published_order() -> None:
    """Its unfold counts (channel, row, column); the published Swin concatenates (0,0), (1,0), (0,1), (1,1)."""
    from dino_d2.checkpoint.convert import _swin_merge_order

    channels = 3
    unfolded = torch.tensor(
        [[c * 100 + row * 10 + column] for c in range(channels) for row in (0, 1) for column in (0, 1)]
    )
    expected = [
        c * 100 + row * 10 + column for row, column in ((0, 0), (1, 0), (0, 1), (1, 1)) for c in range(channels)
    ]
    assert _swin_merge_order(unfolded.T).tolist() == [expected]


def test_91_raw_ids_become_80_classes_chosen_by_id() -> None:
    state = published_by("official")
    conversion = from_published(state, "official", build_model(resnet_config("MODEL.DINO.NUM_CLASSES", "80")))
    for ours, theirs in (("decoder.class_heads.0.weight", "class_embed.0.weight"),
                         ("query_selection.proposals.class_head.bias", "transformer.enc_out_class_embed.bias"),
                         ("denoising.label_embed.weight", "label_enc.weight")):  # fmt: skip
        assert torch.equal(conversion.state[ours][0], state[theirs][1])  # person is category 1
        assert torch.equal(conversion.state[ours][79], state[theirs][90])  # toothbrush is category 90
        assert torch.equal(conversion.state[ours][11], state[theirs][13])  # stop sign: 12 is no category
    assert torch.equal(conversion.state["denoising.label_embed.weight"][80], state["label_enc.weight"][91])
    names = Assumptions.from_tensor(conversion.state[EXTRA_STATE]).class_names
    assert names == tuple(c["name"] for c in COCO)


def test_equal_class_counts_keep_every_row() -> None:
    state = published_by("official")
    conversion = from_published(state, "official", build_model(resnet_config()))
    assert torch.equal(conversion.state["decoder.class_heads.0.weight"], state["class_embed.0.weight"])


def test_label_embedding_may_lack_the_unused_row() -> None:
    state = published_by("official")
    state["label_enc.weight"] = state["label_enc.weight"][:91]
    conversion = from_published(state, "official", build_model(resnet_config()))
    assert torch.equal(conversion.state["denoising.label_embed.weight"][:91], state["label_enc.weight"])
    assert any("unused last row" in note for note in conversion.notes)


def test_shared_heads_can_become_a_head_per_layer() -> None:
    state = published_by("official")
    conversion = from_published(state, "official", build_model(resnet_config(*PER_LAYER)))
    assert torch.equal(conversion.state["decoder.class_heads.1.weight"], state["class_embed.0.weight"])


def test_heads_that_differ_cannot_become_one() -> None:
    state = published_by("mmdet", *PER_LAYER)
    with pytest.raises(ConversionError, match=r"cls_branches\.0.*set MODEL\.DINO\.SHARE_HEADS False"):
        from_published(state, "mmdet", build_model(resnet_config()))


def test_what_a_config_does_not_use_is_listed_and_left_out() -> None:
    model = build_model(resnet_config("MODEL.DINO.DN.TYPE", "none", "MODEL.DINO.QUERY_SELECTION", "pure"))
    conversion = from_published(published_by("official"), "official", model)
    assert "label_enc.weight: not used by this config, ignored" in conversion.notes
    assert "transformer.tgt_embed.weight: not used by this config, ignored" in conversion.notes


def test_queries_are_sliced_and_it_is_said() -> None:
    state = published_by("official")
    conversion = from_published(state, "official", build_model(resnet_config("MODEL.DINO.NUM_QUERIES", "4")))
    assert torch.equal(conversion.state["query_selection.content.weight"], state["transformer.tgt_embed.weight"][:4])
    assert any("the first 4 of 6 queries" in note for note in conversion.notes)


def test_names_left_over_missing_and_of_another_shape_are_all_listed() -> None:
    state = published_by("official")
    state["transformer.surprise.weight"] = torch.zeros(3)
    del state["transformer.enc_output.bias"]
    state["transformer.level_embed"] = torch.zeros(5, 32)
    with pytest.raises(ConversionError) as error:
        from_published(state, "official", build_model(resnet_config()))
    assert "unexpected: transformer.surprise.weight" in str(error.value)
    assert "missing: transformer.enc_output.bias" in str(error.value)
    assert "transformer.level_embed is (5, 32)" in str(error.value)


def test_derived_buffers_may_be_there() -> None:
    state = published_by("official")
    state["backbone.0.body.bn1.num_batches_tracked"] = torch.tensor(7)
    conversion = from_published(state, "official", build_model(resnet_config()))
    assert any("num_batches_tracked: derived" in note for note in conversion.notes)


def test_detrex_weights_under_the_published_position_embedding_are_refused() -> None:
    state = published_by("detrex", *DETREX)
    with pytest.raises(ConversionError, match=r"POS_TEMPERATURE is 20\.0, the weights are for 10000\.0"):
        from_published(state, "detrex", build_model(resnet_config(*PER_LAYER)))


IMPROVED = ["MODEL.DINO.POS_TEMPERATURE", "10000.0", "MODEL.DINO.POS_OFFSET", "-0.5"]
ENCODING = "model = dict(\n    positional_encoding=dict(\n        normalize=True, num_feats=128, %s),\n    type='DINO')"
OF_20 = ENCODING % "offset=0.0, temperature=20"
OF_10000 = ENCODING % "offset=-0.5, temperature=10000"


@pytest.mark.parametrize(
    ("values", "config"),
    [([], ""), (IMPROVED, ""), ([], OF_20), (IMPROVED, OF_10000), (IMPROVED, ENCODING % "offset=-0.5")],
)
def test_position_of_mmdetections_weights_is_that_of_their_config_or_else_ours(values: list[str], config: str) -> None:
    values = [*PER_LAYER, *values]
    model = build_model(resnet_config(*values))
    conversion = from_published(published_by("mmdet", *values), "mmdet", model, config)
    assert Assumptions.from_tensor(conversion.state[EXTRA_STATE]) == model.assumptions
    assert any("from the config" in note for note in conversion.notes) == (config == "")


@pytest.mark.parametrize(
    ("values", "config", "message"),
    [
        ([], OF_10000, r"POS_TEMPERATURE is 20\.0, the weights are for 10000\.0"),
        (IMPROVED, OF_20, r"POS_OFFSET is -0\.5, the weights are for 0\.0"),
        (IMPROVED[2:], "", r"POS_OFFSET is -0\.5, the weights are for 0\.0\n.*or .*POS_TEMPERATURE 10000\.0"),
        (["MODEL.DINO.POS_TEMPERATURE", "7.0"], "", r"POS_TEMPERATURE is 7\.0, the weights are for 20\.0\n"),
    ],
)
def test_position_that_mmdetections_weights_cannot_have_is_refused(values: list, config: str, message: str) -> None:
    state = published_by("mmdet", *PER_LAYER)
    with pytest.raises(ConversionError, match=message):
        from_published(state, "mmdet", build_model(resnet_config(*PER_LAYER, *values)), config)


def test_loading_under_a_config_that_contradicts_the_weights_is_an_error(tmp_path: Path) -> None:
    model = build_model(resnet_config())
    torch.save({"model": from_published(published_by("official"), "official", model).state}, tmp_path / "w.pth")
    DetectionCheckpointer(model).load(str(tmp_path / "w.pth"))
    contradictions = {
        "MODEL.DINO.POS_TEMPERATURE": "10000.0",
        "MODEL.DINO.SHARE_HEADS": "False",
        "MODEL.PIXEL_MEAN": "[103.53, 116.28, 123.675]",
        "INPUT.FORMAT": "BGR",
    }
    for key, value in contradictions.items():
        other = build_model(resnet_config(key, value))
        with pytest.raises(ValueError, match=key):
            DetectionCheckpointer(other).load(str(tmp_path / "w.pth"))


def test_published_programs_have_no_interleaved_encoder() -> None:
    model = build_model(resnet_config("MODEL.DINO.ENCODER", "interleaved"))
    with pytest.raises(ConversionError, match=r"MODEL\.DINO\.ENCODER is interleaved, the weights are for deformable"):
        from_published(published_by("official"), "official", model)
    with pytest.raises(ConversionError, match=r"MODEL\.DINO\.ENCODER is interleaved, which official does not have"):
        to_published(model.state_dict(), "official", model)


def test_class_names_that_contradict_are_an_error() -> None:
    def named(*names: str) -> nn.Module:
        return build_model(resnet_config("MODEL.DINO.NUM_CLASSES", "2", "MODEL.DINO.CLASS_NAMES", str(list(names))))

    state = named("cat", "dog").state_dict()
    named("cat", "dog").load_state_dict(state)
    named().load_state_dict(state)  # not known is no contradiction
    with pytest.raises(ValueError, match="CLASS_NAMES"):
        named("dog", "cat").load_state_dict(state)


def test_weights_of_other_classes_can_be_fine_tuned(tmp_path: Path) -> None:
    """All but the class rows is taken over; these are left as they were initialised."""
    state = from_published(published_by("official"), "official", build_model(resnet_config())).state
    torch.save({"model": state}, tmp_path / "w.pth")
    model = build_model(resnet_config("MODEL.DINO.NUM_CLASSES", "2", "MODEL.DINO.CLASS_NAMES", "['cat', 'dog']"))
    before = model.decoder.class_heads[0].weight.clone()
    DINOCheckpointer(model).load(str(tmp_path / "w.pth"))
    assert torch.equal(model.decoder.class_heads[0].weight, before)
    assert torch.equal(model.encoder.level_embed, state["encoder.level_embed"])


def test_assumptions_survive_the_byte_tensor() -> None:
    names = ("MODEL.DINO.NUM_CLASSES", "2", "MODEL.DINO.CLASS_NAMES", "['Straße', '犬']")
    assumptions = Assumptions.of_config(resnet_config(*names))
    assert Assumptions.from_tensor(assumptions.to_tensor()) == assumptions


def test_file_of_something_else_is_named() -> None:
    with pytest.raises(ConversionError, match="not a known DINO checkpoint"):
        detect_source({"fc.weight": torch.zeros(1)})
