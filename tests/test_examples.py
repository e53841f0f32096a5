"""The examples run, and end at the same accuracy."""

import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_the_same_network_ends_at_the_same_accuracy_in_each_framework():
    accuracies = {}
    for path in sorted(EXAMPLES.glob("digits_*.py")):
        run = subprocess.run([sys.executable, path], check=True, capture_output=True, text=True)
        accuracies[path.stem] = float(re.fullmatch(r"test accuracy (0\.\d{4})\n", run.stdout)[1])
    assert set(accuracies) == {"digits_keras", "digits_optax", "digits_torch"}
    assert min(accuracies.values()) > 0.96
    one_image = 1 / 359  # rounding may turn a close call
    assert max(accuracies.values()) - min(accuracies.values()) < 1.5 * one_image, accuracies
