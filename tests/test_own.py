"""Somebody's own activations: which rows are held out, where they are found again, what is shown of them."""

import numpy as np
import pytest
import torch

from conftest import SMALL_SAE, script
from sae import HELD_OUT, ActivationStore, load_sae
from test_analyses import load

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
