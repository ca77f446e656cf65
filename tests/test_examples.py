"""The examples run as a user would run them, and do what they say."""

import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def output(name):
    result = subprocess.run([sys.executable, EXAMPLES / name], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_example_is_tested():
    assert [path.name for path in sorted(EXAMPLES.glob("*.py"))] == ["03_your_model.py"]


def test_your_model_learns_the_digits():
    printed = output("03_your_model.py")
    accuracy = [float(found) for found in re.findall(r"test accuracy ([\d.]+) %", printed)]
    assert len(accuracy) == 5 and accuracy[-1] >= 95
    assert re.search(r"matrix +memory +1 +0.01 +3 ", printed) and re.search(r"head +adamw", printed)
