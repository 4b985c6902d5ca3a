"""law.js against Python, in node: every field of 1,000 settings drawn from the catalogue."""

import json
import shutil
import subprocess

import pytest

from ternax import page
from tests.page.settings import differences, draw, python_says

NODE = shutil.which("node") or shutil.which("nodejs")
# Reads {tables, settings} and prints each setting's prediction.
PROGRAM = (
    page.part("law.js")
    + """
const { tables, settings } = JSON.parse(require("fs").readFileSync(0, "utf8"));
console.log(JSON.stringify(settings.map((setting) => predict(tables, setting))));
"""
)


@pytest.mark.skipif(NODE is None, reason="node is not installed")
def test_a_thousand_settings_are_pythons():
    settings = draw(1000)
    done = subprocess.run(
        [NODE, "-e", PROGRAM],
        input=json.dumps({"tables": page.tables(), "settings": settings}),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == ""
    answers = json.loads(done.stdout)
    assert len(answers) == len(settings)
    found = [
        (setting, wrong)
        for setting, answer in zip(settings, answers, strict=True)
        if (wrong := differences(python_says(setting), answer))
    ]
    assert found == []
    # The draw meets both limits, both answers about memory, and every part.
    assert {answer["limit"] for answer in answers} >= {"weights", "kv", "compute", "collectives"}
    assert {answer["fits"] for answer in answers} == {True, False}
    assert any(answer["critical_batch"] is None for answer in answers)
