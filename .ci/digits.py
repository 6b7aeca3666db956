"""Checks the report of the main job on digits: accuracies that a user may rely on."""

import json
import sys
from pathlib import Path

report = json.loads(Path(sys.argv[1]).read_text())
last = report["exits"][-1]["accuracy"]
row = next(
    r
    for r in report["policies"]
    if r["name"] == "max_prob" and r["target"] == {"kind": "budget", "value": 0.5}
)
print(f"digits: last exit {last:.3f}, at half the cost {row['accuracy']:.3f}")
assert last >= 0.97, "the last exit should reach 97 % on digits"
assert row["accuracy"] >= last - 0.01, "half the cost should lose at most a point on digits"
