"""`experiments.audit` as a user runs it: files, flags, output, exit codes."""

import pathlib
import subprocess
import sys

import pytest

from ternax.experiments import audit

ROOT = pathlib.Path(__file__).resolve().parents[2]
RIGHT = ROOT / "experiments" / "claims" / "right"
CLAIMS = """\
title: Mine
source: me
year: 2026
tables:
  - name: speed
    rows:
      - {model: 70b, weights: fp16, device: h100, phase: decode, batch: 1, tokens_per_s: 25}
      - {model: 8b, weights: fp16, device: h100, phase: decode, batch: 1, tokens_per_s: 150}
      - {model: 8b, tokens_per_s: 150}
"""


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(CLAIMS)
    return path


def test_a_file_of_ones_own(mine, capsys):
    assert audit.main([str(mine)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Mine: 3 rows: 1 impossible, 0 mislabelled, 1 unverifiable, 1 possible")
    assert "impossible    70b, h100, 25" in out
    assert "too little to judge: tokens_per_s needs device, weights" in out
    assert "8b, h100" not in out
    assert audit.main([f"--claims={mine}", "--all"]) == 0
    assert "8b, h100" in capsys.readouterr().out
    mine.write_text(
        CLAIMS.replace("decode, batch: 1, tokens_per_s: 150", "prefill, tokens_per_s: 9")
    )
    assert audit.main([str(mine), "--all"]) == 0
    assumed = "(assuming projections alone, every operation at the dense fp8 peak)"
    assert assumed in " ".join(capsys.readouterr().out.split())
    assert max(map(len, out.splitlines())) <= 100


def test_the_documents_that_come_along(capsys):
    assert audit.main([]) == 0
    assert capsys.readouterr().out.count(" rows: ") == 5


def test_a_page(mine, tmp_path, capsys):
    page = tmp_path / "page.md"
    assert audit.main([str(mine), f"--output={page}"]) == 0
    assert "| 70b, h100, 25 | **impossible** |" in page.read_text()
    assert list(tmp_path.iterdir()) == [mine, page] or len(list(tmp_path.iterdir())) == 2
    plain = tmp_path / "plain"
    plain.touch()
    assert page.stat().st_mode == plain.stat().st_mode  # what the umask leaves, as of any file
    assert audit.main([str(mine), f"--output={tmp_path}"]) == 6
    assert sorted(tmp_path.iterdir()) == [mine, page, plain]
    gone = tmp_path / "no" / "page.md"
    assert audit.main([str(mine), f"--output={gone}"]) == 6
    assert "cannot be written: No such file" in capsys.readouterr().err


def test_markup_in_a_claim_stays_text(mine, tmp_path, capsys):
    page = tmp_path / "page.md"
    says = "<script>alert(1)</script> & more"
    changed = CLAIMS.replace("title: Mine", "title: 'Mine <b>'").replace(
        "{model: 8b, tokens_per_s: 150}", f"{{says: '{says}', model: 8b, tokens_per_s: 150}}"
    )
    mine.write_text(changed)
    assert audit.main([str(mine), f"--output={page}"]) == 0
    text = page.read_text()
    assert "| &lt;script&gt;alert(1)&lt;/script&gt; &amp; more |" in text
    assert "<script" not in text and "## Mine &lt;b&gt;" in text


def test_a_check_for_ci(mine, capsys):
    assert audit.main([str(mine), "--strict"]) == 5
    assert "1 rows are impossible or mislabelled" in capsys.readouterr().err
    right = [str(path) for path in sorted(RIGHT.iterdir())]
    assert audit.main([*right, "--strict"]) == 0


def test_what_cannot_be_read_is_one_line(mine, capsys):
    mine.write_text(CLAIMS.replace("device: h100", "device: h1000", 1))
    assert audit.main([str(mine)]) == 4
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "mine.yaml: line 7, column 45: no device is named 'h1000'; nearest: h100" in error
    assert audit.main(["gone.yaml"]) == 4
    assert audit.main(["--nosuch"]) == 2


def test_the_example_of_the_guide(tmp_path, capsys):
    """The file in docs/audit.md, as it stands there, gives the lines that stand below it."""
    guide = (ROOT / "docs" / "audit.md").read_text()
    blocks = guide.split("```")
    claims = next(b for b in blocks if b.startswith("yaml\n")).removeprefix("yaml\n")
    screen = next(b for b in blocks if b.startswith("\n$ python -m experiments.audit mine"))
    path = tmp_path / "mine.yaml"
    path.write_text(claims)
    assert audit.main([str(path)]) == 0
    shown = screen.split("mine.yaml\n", 1)[1].rstrip()
    assert capsys.readouterr().out.rstrip() == shown
    table = next(b for b in blocks if b.startswith("markdown\n")).removeprefix("markdown\n")
    (tmp_path / "mine.md").write_text(table)
    assert audit.main([str(tmp_path / "mine.md")]) == 0


def test_every_field_is_in_the_guide():
    """With its meaning, its unit and what it is judged with, as `ternax.audit.fields` has them."""
    from ternax.audit.fields import QUANTITIES, SETTINGS

    rows = [f"| `{name}` | {meaning} |" for name, meaning in SETTINGS.items()]
    for name, field in QUANTITIES.items():
        bare = field.unit or ("a bare number" if field.unit == "" else "needs a unit")
        unit = f"{', '.join(field.dimensions)}; {bare}".replace("*", "any")
        needs = ", ".join(f"`{need.replace(' or ', '` or `')}`" for need in field.needs) or "alone"
        rows.append(f"| `{name}` | {field.meaning} | {unit} | {needs} |")
    guide = (ROOT / "docs" / "audit.md").read_text().splitlines()
    assert [row for row in rows if row not in guide] == []


def test_no_jax_and_at_once():
    code = (
        "import sys\nfrom ternax.experiments import audit\naudit.main([])\n"
        "print([name for name in ('jax', 'flax', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.endswith("[]\n") and done.stderr == ""
