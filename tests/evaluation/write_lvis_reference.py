"""Write lvis_reference.json: what the package lvis, which no test needs, says of generated data.

pip install --no-deps --target lvis_package lvis==0.5.3
PYTHONPATH=.:lvis_package python -m tests.evaluation.write_lvis_reference
"""

from __future__ import annotations

import copy
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

np.float = float  # the package was written before NumPy 1.24 took it away

import lvis  # noqa: E402

from tests.evaluation.generated import Generated, generate_lvis  # noqa: E402

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf")
CASES = [
    {"images": 12, "classes": 6, "objects": 30, "detections": 400, "max_dets": max_dets} for max_dets in (300, 100)
] + [{"images": 15, "classes": 200, "objects": 15, "detections": 350, "max_dets": max_dets} for max_dets in (300, 1000)]


def evaluate(made: Generated, max_dets: int) -> lvis.LVISEval:
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(made.dataset, file)
        file.flush()
        annotations = lvis.LVIS(file.name)
    detections = lvis.LVISResults(annotations, copy.deepcopy(made.detections), max_dets)
    evaluation = lvis.LVISEval(annotations, detections, "bbox")
    evaluation.run()
    return evaluation


def reference(case: dict[str, int]) -> dict[str, Any]:
    made = generate_lvis(case["images"], case["classes"], case["objects"], case["detections"])
    evaluation = evaluate(made, case["max_dets"])
    for image in made.dataset["images"]:
        image["neg_category_ids"] = [category["id"] for category in made.dataset["categories"]]
        image["not_exhaustive_category_ids"] = []
    return case | {
        "metrics": {name: float(evaluation.results[name]) for name in METRICS},
        "sha256_of_precision": hashlib.sha256(evaluation.eval["precision"].tobytes()).hexdigest(),
        "ap_if_all_were_annotated": float(evaluate(made, case["max_dets"]).results["AP"]),
    }


if __name__ == "__main__":
    written = {"obtained": "lvis 0.5.3, by write_lvis_reference.py", "cases": [reference(case) for case in CASES]}
    Path(__file__).with_name("lvis_reference.json").write_text(json.dumps(written, indent=1) + "\n")
