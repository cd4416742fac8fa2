"""What README promises: its size, its tables, and the diff that makes a TopK autoencoder."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

import analyze
import sae
import train_sae
from conftest import ROOT, SMALL_SAE

with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
    README = file.read()
VISIBLE = re.sub(r"(<details>\n<summary>.*?</summary>).*?</details>", r"\1", README, flags=re.S)


def rows_below(heading):
    """The rows of the first table below a heading, as lists of cells."""
    table = README[README.index(heading):].split("\n\n|")[1].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_a_visitor_sees_little_at_first():
    assert VISIBLE.count("<details>") == README.count("<details>") == README.count("</details>") > 8
    assert len(VISIBLE.encode()) <= 13_000


def test_every_equation_has_the_function_and_the_test_that_the_table_names():
    sources = ""
    for name in os.listdir(os.path.join(ROOT, "tests")):
        if name.startswith("test_"):
            with open(os.path.join(ROOT, "tests", name), encoding="utf-8") as file:
                sources += file.read()
    tests = re.findall(r"^def (test_\w+)", sources, re.M)
    rows = rows_below("## Where is each equation?")
    rows += rows_below("Where are the equations of the analyses?")
    assert len(rows) > 35
    for _, _, functions, keywords in rows:
        for function in re.findall(r"`(\w+)`", functions):
            places = (sae, analyze, train_sae, sae.SparseAutoencoder)
            assert any(hasattr(place, function) for place in places), function
        for keyword in keywords.strip("`").split(" or "):
            assert any(keyword in test for test in tests), keyword


def test_every_file_and_picture_that_is_linked_is_there():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("https://") or os.path.exists(os.path.join(ROOT, target)), target


# -----------------------------------------------------------------------------
# the diff

HUNKS = re.search(r"```diff\n--- a/sae.py\n\+\+\+ b/sae.py\n(.*?)```", README, re.S).group(1)


def patched(text, hunks):
    """A text after the hunks of a diff, each of which must fit in exactly one place."""
    for hunk in re.split(r"^@@.*@@.*\n", hunks, flags=re.M)[1:]:
        lines = hunk.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if line[0] in " -")
        after = "".join(line[1:] for line in lines if line[0] in " +")
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    return text


own_recipes = set(sae.RECIPES) != {"scaling", "towards", "tied"}
not_yet = pytest.mark.skipif(own_recipes, reason="a recipe has been added, with this diff or another")


@pytest.fixture(scope="module")
def fork(trained, tmp_path_factory):
    """A copy of the scripts with the diff applied, and in its `out` a TopK autoencoder trained by them."""
    folder = tmp_path_factory.mktemp("fork")
    shutil.copytree(os.path.join(ROOT, "assets"), folder / "assets")
    for name in ("model", "sae", "train_gpt", "train_sae", "analyze"):
        shutil.copy(os.path.join(ROOT, f"{name}.py"), folder)
    source = (folder / "sae.py").read_text(encoding="utf-8")
    (folder / "sae.py").write_text(patched(source, HUNKS), encoding="utf-8")
    shutil.copytree(trained, folder / "out")
    command = re.search(r"python (train_sae.py --recipe=topk .*?) &&", README).group(1).split()
    run(folder, *command, *SMALL_SAE)
    return folder


def run(folder, *command):
    """Runs a script of the copy -> what it printed."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_diff_changes_at_most_twelve_lines_of_one_file():
    assert README.count("```diff") == 1
    assert 0 < sum(line[0] in "+-" for line in HUNKS.splitlines()) <= 12


# In the copy: f by hand from the raw weights, then all that reads activations, and the largest differences.
PROBE = """
import json
import numpy as np
import torch
import analyze
from sae import load_sae

sae = load_sae("out/sae/topk/sae.pt").requires_grad_(False)
run = analyze.Run("out/sae/topk", sae.fold().requires_grad_(False), sae.extra["source"])
analyze.load_model(run, analyze.parse_args())
x = run.x()
z = (x * sae.scale - sae.b_dec) @ sae.W_enc + sae.b_enc
f = torch.zeros_like(z)
for row, column in enumerate(z.topk(32).indices):
    f[row, column] = z[row, column].relu()
raw = f / sae.scale                                  # rows of W_dec are of unit norm: folding changes the units alone
contexts = x.view(len(run.contexts), run.T, -1)
by_context = raw.view(len(run.contexts), run.T, -1)
some = np.arange(len(run.contexts)) % f.shape[1]
clamped = analyze.clamp(run, some, 2.5)(run.site, contexts)
expected = torch.stack([context + (2.5 - acts[:, [i]]) * run.sae.W_dec[i]
                        for context, acts, i in zip(contexts, by_context, some.tolist())])
differences = {
    "encode": sae.encode(x) - f,
    "fold": run.sae.encode(x) - raw,
    "fold's reconstruction": run.sae(x) - sae(x),
    "activations": torch.from_numpy(run.activations(np.arange(f.shape[1]))).t() - raw,
    "clamp": clamped - expected,
    "clamp of one": analyze.clamp(run, [5], 2.5)(run.site, contexts) - contexts
        - (2.5 - by_context[..., [5]]) * run.sae.W_dec[5],
    "the loss": sae.loss(x, 0.0)[0] - ((f @ sae.W_dec + sae.b_dec - x * sae.scale) ** 2).sum(1).mean(),
}
counts = (f > 0).sum(1)
print(json.dumps({
    "differences": {name: value.abs().max().item() for name, value in differences.items()},
    "l0": counts.float().mean().item(), "positive": (z > 0).sum(1).clamp(max=32).float().mean().item(),
    "trained l0": [line["l0"] for line in sae.extra["log"]],
}))
"""


@not_yet
def test_training_and_all_analyses_see_the_activations_of_the_diff(fork):
    (fork / "probe.py").write_text(PROBE, encoding="utf-8")
    found = json.loads(run(fork, "probe.py").splitlines()[-1])
    assert found["l0"] == pytest.approx(found["positive"]) and found["l0"] > 31
    assert all(31 < l0 <= 32 for l0 in found["trained l0"])
    for name, difference in found["differences"].items():
        assert difference < 1e-4, name


@not_yet
def test_report_and_steer_of_the_diff(fork):
    printed = run(fork, "analyze.py", "--name=topk", "--show=2")
    metrics = json.loads((fork / "out/sae/topk/metrics.json").read_text())
    assert 31 < metrics["l0"] <= 32 and f"{metrics['l0']:.1f}   active features a token" in printed
    alive = re.findall(r"^feature (\d+) ", printed, re.M)[0]
    assert "x max" in run(fork, "analyze.py", "steer", "--name=topk", f"--feature={alive}")
