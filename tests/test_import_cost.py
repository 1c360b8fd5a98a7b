"""What importing the package costs: measured in modules, which a busy machine cannot change."""

from __future__ import annotations

import json
import subprocess
import sys

PROGRAM = """
import json, sys
{before}
known = set(sys.modules)
{after}
print(json.dumps(sorted(set(sys.modules) - known)))
"""


def newly_imported(before: str, after: str) -> list[str]:
    program = PROGRAM.format(before=before, after=after)
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_fast_encoder_brings_nothing_but_itself() -> None:
    new = newly_imported("import sentence_transformers", "from sbert_fast import FastEncoder")
    foreign = {name for name in new if name.split(".")[0] != "sbert_fast"}
    assert "sbert_fast.sentence_transformers.encoder" in new
    assert foreign == set()


def test_package_alone_imports_no_torch() -> None:
    new = newly_imported("", "import sbert_fast")
    assert "sbert_fast" in new
    assert not {"torch", "transformers", "sentence_transformers"} & set(new)


def test_accelerate_needs_no_sentence_transformers() -> None:
    new = newly_imported("", "from sbert_fast import accelerate")
    assert "transformers" in new and "sentence_transformers" not in new
