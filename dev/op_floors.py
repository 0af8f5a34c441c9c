#!/usr/bin/env python3
"""What should limit the CUDA kernels on a card: a model, computed from counts and public figures, not a measurement.

    dev/op_floors.py

Prints two Markdown tables: times below which no kernel can be (docs/op.md), and how many additions would be left if a
block of threads or a warp first joined those to the same token (docs/performance.md). Needs nothing but NumPy.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np

LEVELS = [(100, 167), (50, 84), (25, 42), (13, 21)]  # of 800x1333
TOKENS = sum(height * width for height, width in LEVELS)
HEADS, CHANNELS, POINTS, CORNERS = 8, 32, 4, 4
SAMPLES = len(LEVELS) * POINTS
SPREAD = 0.03  # standard deviation of offsets, relative to the image, as in dev/benchmark_op.py
TILE_WIDTH = 8
ADDED_SECTORS = CHANNELS * 4 // 32  # of one row and corner, by tests/ops/test_cuda_kernels_on_cpu.py
REACHED = 0.75  # share of the highest floor that a good kernel reaches
LEAST = 5e-6  # seconds: a launch, and one row after the other in a warp


@dataclass(frozen=True)
class Card:
    """Public figures; of L2, where there are none, what was measured by others, or is believed."""

    name: str
    multiprocessors: int
    clock: float  # Hz, boost
    memory: float  # bytes per second
    l2: float  # bytes per second, reading
    slices: int  # of L2; each adds to one sector in a cycle
    instructions: dict[str, tuple[float, float]]  # per sample and row, forward and backward, by dev/cuda_report.py


SM_80 = {"float32": (13.2, 31.4), "bfloat16": (13.9, 31.8)}  # also for sm_89
SM_90 = {"float32": (13.4, 28.2), "bfloat16": (14.0, 25.3)}
CARDS = [
    Card("H100 SXM", 132, 1.755e9, 3.35e12, 5.5e12, 96, SM_90),
    Card("A100 80 GB", 108, 1.41e9, 2.04e12, 4.5e12, 80, SM_80),
    Card("RTX 4090", 128, 2.52e9, 1.01e12, 5.0e12, 48, SM_80),
]


def tokens_of_samples() -> tuple[np.ndarray, np.ndarray]:
    """Level and place of every query of an encoder, and the tokens (queries, levels, points, corners) that one head
    samples; -1 outside."""
    random = np.random.default_rng(0)
    queries = [
        (level, y, x) for level, (height, width) in enumerate(LEVELS) for y in range(height) for x in range(width)
    ]
    places = np.array(queries)
    sides = np.array(LEVELS)
    centres = (places[:, 1:] + 0.5) / sides[places[:, 0]]  # (y, x)
    tokens = np.full((len(places), len(LEVELS), POINTS, CORNERS), -1)
    start = 0
    for level, (height, width) in enumerate(LEVELS):
        offsets = random.normal(0, SPREAD, (len(places), POINTS, 2))
        top_left = np.floor((centres[:, None] + offsets) * (height, width) - 0.5).astype(int)
        for corner in range(CORNERS):
            y, x = top_left[..., 0] + corner // 2, top_left[..., 1] + corner % 2
            inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
            tokens[:, level, :, corner] = np.where(inside, start + y * width + x, -1)
        start += height * width
    return places, tokens


def distinct_share(places: np.ndarray, tokens: np.ndarray, height: int, width: int) -> list[float]:
    """Share of distinct tokens among those that a tile of queries samples, for each level and for all."""
    tile = (places[:, 0] * 1000 + places[:, 1] // height) * 1000 + places[:, 2] // width
    shares = []
    for part in [tokens[:, level] for level in range(len(LEVELS))] + [tokens]:
        of_tile = np.broadcast_to(tile.reshape(-1, *[1] * (part.ndim - 1)), part.shape)[part >= 0]
        seen = part[part >= 0]
        shares.append(len(np.unique(of_tile * TOKENS + seen)) / len(seen))
    return shares


def floors(card: Card, dtype: str, queries: int, backward: bool, distinct: float) -> dict[str, float]:
    """Seconds that each resource needs at least."""
    size = 4 if dtype == "float32" else 2
    rows = queries * HEADS
    samples = rows * SAMPLES
    gathered = samples * CORNERS * CHANNELS * size
    added = samples * CORNERS * CHANNELS * 4
    values = TOKENS * HEADS * CHANNELS
    least = values * size + rows * (SAMPLES * 3 * 4 + CHANNELS * size)
    cycles = card.multiprocessors * card.clock
    result = {"issue": samples * card.instructions[dtype][backward] / (4 * cycles), "L1": gathered / (128 * cycles)}
    through_l2 = gathered * distinct + rows * (SAMPLES * 3 * 4 + CHANNELS * size)
    if backward:
        least += values * 4 + rows * SAMPLES * 3 * 4
        result["L1"] += added / (64 * cycles)  # to L2, 64 bytes in a cycle
        through_l2 += rows * SAMPLES * 3 * 4
        result["atomics"] = samples * CORNERS * ADDED_SECTORS / (card.slices * card.clock)
    result["L2"] = through_l2 / card.l2
    result["memory"] = least / card.memory
    return result


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    places, tokens = tokens_of_samples()
    tiles = {"warp, float32: 4 x 1": (1, 4), "warp, 16 bits: 8 x 1": (1, 8)}
    tiles |= {"block, float32: 8 x 4": (4, TILE_WIDTH), "block, 16 bits: 8 x 8": (8, TILE_WIDTH)}
    shares = {name: distinct_share(places, tokens, *tile) for name, tile in tiles.items()}

    names = ["issue", "L1", "L2", "memory", "atomics"]
    print("| microseconds | " + " | ".join(names) + " | expected |")
    print("| --- |" + " ---: |" * (len(names) + 1))
    for card in CARDS:
        for queries, shape in ((TOKENS, "encoder"), (900, "decoder")):
            for dtype, block in (("float32", "block, float32: 8 x 4"), ("bfloat16", "block, 16 bits: 8 x 8")):
                for backward in (False, True):
                    distinct = shares[block][-1] if shape == "encoder" else 1.0
                    found = floors(card, dtype, queries, backward, distinct)
                    expected = max(LEAST, max(found.values()) / REACHED)
                    cells = [f"{found[name] * 1e6:.1f}" if name in found else "" for name in names]
                    way = "backward" if backward else "forward"
                    row = f"{card.name}, {shape}, {dtype}, {way}"
                    print(f"| {row} | {' | '.join(cells)} | {expected * 1e6:.0f} |")

    print("\n| additions left | " + " | ".join(f"{h} x {w}" for h, w in LEVELS) + " | all |")
    print("| --- |" + " ---: |" * (len(LEVELS) + 1))
    for name, share in shares.items():
        print(f"| {name} | " + " | ".join(f"{part:.0%}" for part in share) + " |")


if __name__ == "__main__":
    main()
