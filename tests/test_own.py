"""Somebody's own activations: which rows are held out, where they are found again, what is shown of them."""

import json
import os
import re
import shutil
from unittest import mock

import numpy as np
import pytest
import torch

import train_sae
from conftest import SMALL_SAE, script
from sae import HELD_OUT, ActivationStore, SAEConfig, SparseAutoencoder, load_sae, own_source, save_sae
from test_analyses import load
from test_scripts import hashes

# files of several lengths, of which 0 1 2 are trained on, the end of 3, 4 and 5 is held out: 5 % of 800 rows
LENGTHS = {"a": 300, "b": 1, "c": 439, "d": 29, "e": 7, "f": 24}


def drawn_files(folder, dtype="float32", seed=0):
    """Writes the files, one number of a .npy each, and returns their rows, all of them as one array."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    files = {}
    for name, length in LENGTHS.items():
        files[name] = (rng.exponential(1.0, (length, 12)) * (rng.random((length, 12)) < 0.3)).astype(dtype)
        np.save(folder / f"{name}.npy", files[name])
    return np.concatenate(list(files.values()))


def place_by_hand(number):
    """The number of a row among all -> its file and its index there."""
    for name, length in LENGTHS.items():
        if number < length:
            return name, number
        number -= length


def train_on(pattern, out, *flags):
    done = script("train_sae.py", f"--acts={pattern}", f"--out_dir={out}", *SMALL_SAE, *flags)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("slice_bytes", [10 * 12 * 4, 128 * 2**20])
def test_a_store_says_of_every_row_in_which_file_it_is(tmp_path, monkeypatch, slice_bytes):
    monkeypatch.setattr(ActivationStore, "SLICE_BYTES", slice_bytes)
    rows = drawn_files(tmp_path)
    store = ActivationStore(sorted(map(str, tmp_path.glob("*.npy"))), part=HELD_OUT)
    assert (store.first, store.rows, store.total) == (760, 40, 800)
    np.testing.assert_array_equal(store.at(store.spread(100)), rows[760:])
    places = store.spread(7)
    assert places.tolist() == [0, 5, 11, 17, 22, 28, 34]
    np.testing.assert_array_equal(store.at(places), rows[760 + places])
    for place in range(40):
        name, index = place_by_hand(760 + place)
        assert store.file_and_row(place) == (str(tmp_path / f"{name}.npy"), index)


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_every_command_is_given_the_held_out_rows_and_what_features_do_there(tmp_path, dtype):
    rows = drawn_files(tmp_path / "my", dtype).astype(np.float32)
    train_on(f"{tmp_path}/my/*.npy", tmp_path)
    this = load(tmp_path)
    assert this.kind == "own"
    assert this.x().dtype == torch.float32
    np.testing.assert_array_equal(this.x(), rows[760:])
    np.testing.assert_array_equal(this.held_out.float(), rows[760:])
    sae = load_sae(tmp_path / "sae/scaling/sae.pt").fold()
    x, W_enc, b_enc = rows[760:].astype(np.float64), sae.W_enc.detach().double(), sae.b_enc.detach().double()
    expected = np.maximum(x @ W_enc.numpy() + b_enc.numpy(), 0).T
    assert (expected > 0).any(1).mean() > 0.5
    np.testing.assert_allclose(this.activations([5, 0, 95]), expected[[5, 0, 95]], atol=1e-5)


def interrupted(pattern, out, *flags):
    """Trains on somebody's own rows for 20 of 60 steps."""
    with mock.patch.object(train_sae, "steps", lambda first, *_: range(first, 20)):
        done = script("train_sae.py", f"--acts={pattern}", f"--out_dir={out}", *SMALL_SAE, *flags)
    assert done.returncode == 130, done.stderr


def weights(out):
    return torch.load(out / "sae/scaling/sae.pt", weights_only=True)["weights"]


@pytest.mark.parametrize("change", ["no", "spelled", "moved", "renamed", "touched"])
def test_the_same_rows_are_resumed_wherever_they_lie(tmp_path, monkeypatch, change):
    drawn_files(tmp_path / "my")
    train_on(f"{tmp_path}/my/*.npy", tmp_path / "whole")
    interrupted(f"{tmp_path}/my/*.npy", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    pattern = {"spelled": "./my/../my/?.npy", "moved": "other/*.npy"}.get(change, "my/*.npy")
    if change == "moved":
        os.rename("my", "other")
    if change == "renamed":
        for name in LENGTHS:
            os.rename(f"my/{name}.npy", f"my/z{name}.npy")
    if change == "touched":
        os.utime("my/a.npy", (1, 1))
    assert "going on from" in train_on(pattern, tmp_path / "out", "--resume")
    resumed, whole = weights(tmp_path / "out"), weights(tmp_path / "whole")
    assert all(torch.equal(value, whole[name]) for name, value in resumed.items())
    load(tmp_path / "out")  # at the place where they were read last


@pytest.mark.parametrize("change", ["a value", "another order", "one less", "gpt", "toy"])
def test_other_rows_of_the_same_shape_are_not_resumed(trained, tmp_path, change):
    """In another order of the files other rows are held out."""
    out, pattern = tmp_path / "out", f"{tmp_path}/my/*.npy"
    shutil.copytree(trained, out)
    shutil.rmtree(out / "acts")
    rows = drawn_files(tmp_path / "my")
    interrupted(pattern, out, "--name=mine")
    if change == "a value":
        rows[5, 7] += 1
        np.save(tmp_path / "my/a.npy", rows[:300])
    elif change == "another order":
        (tmp_path / "my/a.npy").rename(tmp_path / "my/z.npy")
    elif change == "one less":
        (tmp_path / "my/b.npy").unlink()
    else:
        pattern = change
    before = hashes(out)
    done = script("train_sae.py", f"--acts={pattern}", f"--out_dir={out}", *SMALL_SAE, "--name=mine", "--resume")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "other activations" in done.stderr and "without --resume" in done.stderr
    assert hashes(out) == before  # nor are the model's activations written to disk


def test_another_model_is_refused_before_its_activations_are_written(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "out")
    path = tmp_path / "out/sae/scaling/sae.pt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["source"]["gpt"], checkpoint["step"] = "another", 40
    torch.save(checkpoint, path)
    shutil.rmtree(tmp_path / "out/acts")
    done = script("train_sae.py", f"--out_dir={tmp_path / 'out'}", *SMALL_SAE, "--resume")
    assert done.returncode == 2 and "other activations" in done.stderr
    assert not (tmp_path / "out/acts").exists()


def test_rows_are_found_where_they_moved_with_the_autoencoder_and_else_where_they_were(tmp_path):
    rows, there = drawn_files(tmp_path / "here/my"), tmp_path / "there"
    train_on(f"{tmp_path}/here/my/*.npy", tmp_path / "here/out")

    def files_of(out):
        this = load(out)
        np.testing.assert_array_equal(this.x(), rows[760:])
        return {os.path.dirname(path) for path, _, _ in this.store.slices}

    shutil.copytree(tmp_path / "here", there)
    assert files_of(there / "out") == {str(there / "my")}
    shutil.rmtree(there / "my")
    assert files_of(there / "out") == {str(tmp_path / "here/my")}
    drawn_files(there / "my", seed=1)  # others that happen to lie there
    assert files_of(there / "out") == {str(tmp_path / "here/my")}
    (tmp_path / "here/my").rename(there / "your")
    os.symlink(there / "your", tmp_path / "here/my")
    assert files_of(there / "out") == {str(tmp_path / "here/my")}
    os.symlink(tmp_path / "here/out", tmp_path / "link")
    assert files_of(tmp_path / "link") == {str(tmp_path / "here/my")}


@pytest.mark.parametrize("change, words", [("gone", "d.npy is gone"), ("other", "d.npy has changed")])
def test_rows_that_are_gone_or_others_are_said_to_be_so(tmp_path, change, words):
    drawn_files(tmp_path / "my")
    train_on(f"{tmp_path}/my/*.npy", tmp_path / "out")
    if change == "gone":
        (tmp_path / "my/d.npy").unlink()
    else:
        np.save(tmp_path / "my/d.npy", np.ones((29, 12), dtype=np.float32))
    before = hashes(tmp_path)
    done = script("analyze.py", f"--out_dir={tmp_path / 'out'}")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert words in done.stderr and "--acts" in done.stderr
    assert hashes(tmp_path) == before


@pytest.mark.parametrize("change", ["no", "one", "another order", "one more"])
def test_rows_that_were_trained_on_are_never_called_held_out(tmp_path, change):
    """All files as they were trained on have the last twentieth held out; of some of them nobody can tell which rows."""
    drawn_files(tmp_path / "my")
    train_on(f"{tmp_path}/my/*.npy", tmp_path / "out")
    pattern = f"{tmp_path}/my/{'c' if change == 'one' else '*'}.npy"
    if change == "another order":
        (tmp_path / "my/a.npy").rename(tmp_path / "my/z.npy")
    if change == "one more":
        np.save(tmp_path / "my/g.npy", np.ones((9, 12), dtype=np.float32))
    done = script("analyze.py", f"--acts={pattern}", "--show=1", f"--out_dir={tmp_path / 'out'}", "--device=cpu")
    if change == "no":
        assert done.returncode == 0 and "on 40 held-out rows" in done.stdout, done.stderr
    else:
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert "was trained on: give all of these, in the order of training, or none" in done.stderr


# -----------------------------------------------------------------------------
# what is shown


def analyzed(out, *arguments):
    """Runs a command that must succeed -> what it printed."""
    done = script("analyze.py", *arguments, f"--out_dir={out}", "--device=cpu")
    assert done.returncode == 0, done.stderr
    return done.stdout


def planted(out, folder, **extra):
    """
    Files in two folders, and an autoencoder without a log that reads columns: feature 0 is column 3 less 1, with a
    direction of mostly column 3, feature 1 is column 5. Returns all rows.
    """
    rows = drawn_files(folder)
    for name in LENGTHS:
        path = folder / ("late" if name > "c" else "early") / f"{name}.npy"
        path.parent.mkdir(exist_ok=True)
        (folder / f"{name}.npy").rename(path)
    sae = SparseAutoencoder(SAEConfig(12, 3))
    with torch.no_grad():
        for p in sae.parameters():
            p.zero_()
        sae.W_enc[3, 0], sae.W_enc[5, 1], sae.b_enc[0], sae.b_enc[2] = 1.0, 1.0, -1.0, -1.0
        sae.W_dec[0, 3], sae.W_dec[0, 7], sae.W_dec[0, 0], sae.W_dec[1, 5], sae.W_dec[2, 0] = 0.8, -0.48, 0.36, 1, 1
    (out / "sae/given").mkdir(parents=True)
    save_sae(out / "sae/given/sae.pt", sae, **extra)
    return rows


@pytest.mark.parametrize("texts", [False, True])
def test_a_feature_shows_the_file_the_index_and_the_text_of_its_rows(tmp_path, texts):
    out, pattern = tmp_path / "out", f"{tmp_path}/my/*/*.npy"
    rows = planted(out, tmp_path / "my")
    flags = ["--name=given", f"--acts={pattern}"]
    held_out = range(800)
    if texts:  # and files that it says it was trained on, of which the last twentieth is held out
        sae = load_sae(out / "sae/given/sae.pt")
        paths = sorted(map(str, (tmp_path / "my").glob("*/*.npy")))
        save_sae(out / "sae/given/sae.pt", sae, source=own_source(paths, out / "sae/given"))
        lines = "".join(f"this is row {i}\x1b[31m\r of all\r\n" for i in range(800))
        (tmp_path / "lines.txt").write_bytes(lines.encode()[:-2])
        flags, held_out = ["--name=given", f"--texts={tmp_path}/lines.txt"], range(760, 800)
    printed = analyzed(out, "feature", "0", *flags)

    acts = {i: max(0, rows[i, 3] - 1) for i in held_out}
    density = sum(act > 0 for act in acts.values()) / len(acts)
    largest = max(acts.values())
    assert f"feature 0  density {density:.2%}  max {largest:.2f}  " in printed
    shown = re.findall(r"^ *(top|\d+-\d+%)? +(\d+\.\d\d)  (\w+/)?(\w)\.npy (\d+) *(.*)$", printed, re.M)
    places = {place_by_hand(i): i for i in range(800)}
    numbers = [places[name, int(index)] for _, _, _, name, index, _ in shown]
    assert len(set(numbers)) == len(numbers)
    label = ""
    for number, (new_label, act, folder, name, _, text) in zip(numbers, shown):
        label = new_label or label
        assert f"{acts[number]:.2f}" == act
        assert folder == ("" if texts else "early/" if name < "d" else "late/")  # held out are those of one folder
        assert text == (f"this is row {number}·[31m· of all" if texts else "")
        if label != "top":
            low, high = (int(part) / 100 * largest for part in label[:-1].split("-"))
            assert low < acts[number] <= high
    ranked = sorted((i for i in held_out if acts[i] > 0), key=lambda i: -acts[i])
    assert numbers[:20] == ranked[:20] and (len(ranked) > 20 or texts)
    assert "columns  3 +0.80  7 -0.48  0 +0.36" in printed
    assert "neurons" not in printed and "raises" not in printed


@pytest.mark.parametrize("extra", [{}, {"source": "a page on the net"}], ids=["nothing", "a note"])
def test_an_autoencoder_of_another_program_is_judged_on_all_rows_that_are_named(tmp_path, extra):
    out = tmp_path / "out"
    rows = planted(out, tmp_path / "my", **extra).astype(np.float64)
    before = (out / "sae/given/sae.pt").read_bytes()
    done = script("analyze.py", "--name=given", f"--out_dir={out}")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--acts" in done.stderr

    printed = analyzed(out, "--name=given", f"--acts={tmp_path}/my/**/*.npy", "--show=2")
    f = np.stack([np.maximum(rows[:, 3] - 1, 0), rows[:, 5]], 1)
    x_hat = np.zeros_like(rows)
    x_hat[:, 3], x_hat[:, 7], x_hat[:, 0], x_hat[:, 5] = 0.8 * f[:, 0], -0.48 * f[:, 0], 0.36 * f[:, 0], f[:, 1]
    explained = 1 - np.square(rows - x_hat).sum() / np.square(rows - rows.mean(0)).sum()
    metrics = json.loads((out / "sae/given/metrics.json").read_text())
    assert metrics["tokens"] == 800 and metrics["dead"] == pytest.approx(1 / 3)
    assert metrics["l0"] == pytest.approx((f > 0).sum(1).mean())
    assert metrics["variance_explained"] == pytest.approx(explained, abs=1e-6)
    assert "on 800 held-out rows" in printed and "no log.jsonl" in printed
    assert "1 of 3 never active on 800 rows\n" in printed  # it was not trained on them
    best, drawn = re.split("drawn at random", printed)[0:2]
    energy = np.square(f).mean(0)
    assert re.findall(r"^feature (\d)", best, re.M) == [str(i) for i in np.argsort(-energy)]
    assert sorted(re.findall(r"^feature (\d)", drawn, re.M)) == ["0", "1"]  # 2 is dead
    found = {path.name for path in (out / "sae/given").iterdir()}
    assert found == {"sae.pt", "metrics.json", "density.png"}

    for arguments in (["analyze.py", "scaling"], ["train_sae.py", "--acts=toy", "--resume", *SMALL_SAE]):
        done = script(*arguments, "--name=given", f"--acts={tmp_path}/my/**/*.npy", f"--out_dir={out}")
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "run without" not in done.stderr
    assert (out / "sae/given/sae.pt").read_bytes() == before


def test_a_copy_without_its_log_is_analyzed_and_scaling_proposes_nothing_that_harms_it(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "out")
    (tmp_path / "out/sae/scaling/log.jsonl").unlink()
    printed = analyzed(tmp_path / "out", "--show=1")
    assert "no log.jsonl" in printed and (tmp_path / "out/sae/scaling/features.html").exists()
    done = script("analyze.py", "scaling", f"--out_dir={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr  # sae.pt alone tells


@pytest.mark.parametrize("flags, words", [
    (["--texts=short.txt"], ["short.txt", "799 lines", "800 rows"]),
    (["--texts=long.txt"], ["long.txt", "801 lines", "800 rows"]),
    (["--texts=nowhere.txt"], ["nowhere.txt"]),
    (["--acts=wide.npy"], ["wide.npy", "width 13", "takes 12"]),
    (["--acts=no/*.npy"], ["no file matches --acts=no/*.npy"]),
])
def test_a_mistake_is_one_line(tmp_path, monkeypatch, flags, words):
    planted(tmp_path / "out", tmp_path / "my")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("a\n" * 798 + "a")
    (tmp_path / "long.txt").write_text("a\n" * 801)
    np.save("wide.npy", np.ones((30, 13), dtype=np.float32))
    done = script("analyze.py", "feature", "0", "--name=given", "--acts=my/*/*.npy", *flags)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    for word in words:
        assert word in done.stderr
