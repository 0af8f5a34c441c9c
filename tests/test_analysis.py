"""Costs against counts by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from dino_d2 import load_config
from dino_d2.analysis import Analysis, Cost, analyze, as_table, attention_flops, ms_deform_attn_flops
from dino_d2.tools import analyze as command_line

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def tiny(tiny_cfg: CfgNode) -> Analysis:
    return analyze(build_model(tiny_cfg), 64, 96)


# --- formulas


def test_deformable_attention_is_five_multiply_adds_per_sample_and_channel() -> None:
    """2 queries, 1 head, 1 level, 3 points: 6 samples of 4 channels, each of 4 pixels and 1 weight."""
    assert ms_deform_attn_flops(value=(1, 9, 1, 4), weights=(1, 2, 1, 1, 3)) == 6 * 4 * (4 + 1)


def test_deformable_attention_grows_with_queries_and_not_with_tokens() -> None:
    cost = ms_deform_attn_flops((2, 100, 8, 32), (2, 900, 8, 4, 4))
    assert ms_deform_attn_flops((2, 5000, 8, 32), (2, 900, 8, 4, 4)) == cost
    assert ms_deform_attn_flops((2, 100, 8, 32), (2, 1800, 8, 4, 4)) == 2 * cost


def test_attention_is_two_matrix_products() -> None:
    """Per head 3 x 4 products of 5 numbers, then sums of 4 for 3 x 6 results."""
    assert attention_flops((1, 2, 3, 5), (1, 2, 4, 5), (1, 2, 4, 6)) == 2 * (3 * 4 * 5 + 3 * 4 * 6)


# --- a model


def test_decoder_is_counted_as_by_hand(tiny_config: Callable[..., CfgNode]) -> None:
    cfg = tiny_config()
    c = cfg.MODEL.DINO
    levels = [(8, 12), (4, 6), (2, 3), (1, 2)]  # of 64 x 96 pixels
    tokens = sum(height * width for height, width in levels)
    q, d, ffn = c.NUM_QUERIES, c.HIDDEN_DIM, c.DIM_FEEDFORWARD
    samples = c.NHEADS * len(levels) * c.NUM_POINTS
    self_attention = 4 * q * d * d + 2 * q * q * d
    cross_attention = tokens * d * d + 3 * q * d * samples + q * d * d + 5 * q * samples * (d // c.NHEADS)
    feed_forward = 2 * q * d * ffn
    query_position = q * (2 * d * d + d * d)
    boxes = 2 * q * (2 * d * d + 4 * d)  # of the normed and the un-normed output
    norms = 5 * 4 * q * d  # fvcore's rough five per number
    classes = q * d * c.NUM_CLASSES  # those of earlier layers are not part of the result: a trace drops them
    layer = self_attention + cross_attention + feed_forward + query_position + boxes + norms
    assert analyze(build_model(cfg), 64, 96).stages["decoder"].flops == c.DEC_LAYERS * layer + classes


def test_stages_add_up_to_the_total(tiny: Analysis) -> None:
    assert list(tiny.stages) == ["backbone", "neck", "encoder", "query_selection", "denoising", "decoder"]
    for quantity in ("parameters", "flops", "activations"):
        assert sum(getattr(cost, quantity) for cost in tiny.stages.values()) == getattr(tiny.total, quantity)
    assert all(cost.flops > 0 and cost.activations > 0 for name, cost in tiny.stages.items() if name != "denoising")
    assert (tiny.stages["denoising"].flops, tiny.stages["denoising"].activations) == (0, 0)


def test_what_multiplies_matrices_is_counted(tiny: Analysis) -> None:
    heavy = ("mm", "conv", "linear", "attn", "attention", "grid_sampler")
    assert [name for name in tiny.not_counted if any(word in name for word in heavy)] == []


def test_model_is_left_as_it_was(tiny_cfg: CfgNode) -> None:
    model = build_model(tiny_cfg).train()
    analyze(model, 64, 64)
    assert model.training
    attention = model.encoder.layers[0].self_attn
    assert len(attention._forward_pre_hooks) == 0


def test_larger_image_costs_more_and_has_no_more_parameters(tiny_cfg: CfgNode, tiny: Analysis) -> None:
    larger = analyze(build_model(tiny_cfg), 128, 192)
    assert larger.total.parameters == tiny.total.parameters
    assert larger.stages["backbone"].flops == 4 * tiny.stages["backbone"].flops  # every map is four times as large


def test_r50_has_the_parameters_of_the_paper() -> None:
    cfg = load_config(str(ROOT / "configs/dino_r50_4scale_12ep.yaml"))
    result = analyze(build_model(cfg), 64, 64)
    assert 46e6 < result.total.parameters < 48e6


# --- tables and the command line

COSTS = Analysis({"backbone": Cost(2_500_000, 3 * 10**9, 10**6)}, Cost(2_500_000, 3 * 10**9, 10**6), {})


def test_table_is_in_millions_and_thousand_millions() -> None:
    assert as_table(COSTS, markdown=True).splitlines() == [
        "| stage | parameters (M) | FLOPs (G) | activations (M) |",
        "| --- | ---: | ---: | ---: |",
        "| backbone | 2.50 | 3.00 | 1.00 |",
        "| total | 2.50 | 3.00 | 1.00 |",
    ]
    lines = as_table(COSTS, markdown=False).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["backbone", "2.50", "3.00", "1.00"],
        ["total", "2.50", "3.00", "1.00"],
    ]
    assert len({len(line) for line in lines}) == 1  # columns end together


def write_config(tmp_path: Path, cfg: CfgNode) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text(cfg.dump())
    return str(path)


def test_command_line_prints_every_stage(tmp_path: Path, tiny_cfg: CfgNode, capsys) -> None:
    config = write_config(tmp_path, tiny_cfg)
    command_line.main(["--config-file", config, "--size", "64", "96", "--markdown", "MODEL.DINO.DEC_LAYERS", "1"])
    printed = capsys.readouterr().out
    assert "one image of 64 x 96 pixels" in printed
    assert all(f"| {stage} |" in printed for stage in ("backbone", "neck", "encoder", "query_selection", "decoder"))
    assert "One multiply-add counts as one FLOP" in printed
    assert "Not counted: aten::" in printed


def test_command_line_traces_a_backbone_with_checkpointing(tmp_path: Path, tiny_cfg: CfgNode, capsys) -> None:
    swin = [
        "MODEL.BACKBONE.NAME", "build_swin_backbone", "MODEL.DINO.IN_FEATURES", "['p1', 'p2', 'p3']",
        "MODEL.SWIN.EMBED_DIM", "12", "MODEL.SWIN.DEPTHS", "[1, 1, 1, 1]", "MODEL.SWIN.CHECKPOINT", "True",
    ]  # fmt: skip
    command_line.main(["--config-file", write_config(tmp_path, tiny_cfg), "--size", "64", "64", *swin])
    assert "total" in capsys.readouterr().out


def test_size_that_is_none_is_refused(tmp_path: Path, tiny_cfg: CfgNode, capsys) -> None:
    with pytest.raises(SystemExit):
        command_line.main(["--config-file", write_config(tmp_path, tiny_cfg), "--size", "0", "64"])
    assert "--size 0 64: both must be at least 1" in capsys.readouterr().err
