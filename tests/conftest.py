"""Puts the root on the path, keeps torch to itself, trains one tiny model for all tests that need one."""

import importlib
import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from model import run  # noqa: E402

torch.set_num_threads(1)  # the models here are too small for two

TEXT = "".join(f"def add_{i}(self, x{i % 7}):\n    return self.total + x{i % 7} * {i}\n\n\n" for i in range(400))
SMALL_GPT = [
    "--vocab_size=300",
    "--block_size=32",
    "--n_embd=16",
    "--n_head=2",
    "--batch_size=8",
    "--max_iters=30",
    "--eval_interval=10",
    "--eval_iters=2",
    "--device=cpu",
]
SMALL_SAE = [
    "--n_acts=4000",
    "--n_features=96",
    "--batch_size=128",
    "--max_iters=60",
    "--log_interval=20",
    "--device=cpu",
]


def pytest_configure(config):  # pytest undoes the filters that the scripts set
    for message in ("Sparse CSR tensor support is in beta", "Detected pickle protocol"):
        config.addinivalue_line("filterwarnings", f"ignore:{message}")


def script(name, *flags):
    """Runs a script as `python name flags` would, in this process: -> returncode, stdout, stderr."""
    module = importlib.import_module(name.removesuffix(".py"))
    out, err, code = io.StringIO(), io.StringIO(), 0
    with mock.patch.object(sys, "argv", [name, *map(str, flags)]), redirect_stdout(out), redirect_stderr(err):
        try:
            run(module.main)
        except SystemExit as stop:
            code = stop.code
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """An out_dir (a space and an accent in its name) with a tiny GPT and autoencoder, made by the scripts."""
    folder = tmp_path_factory.mktemp("a tiny rün")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    out = folder / "out"
    for name, *flags in (
        ("train_gpt.py", f"--dataset={folder / 'text.txt'}", *SMALL_GPT),
        ("train_sae.py", *SMALL_SAE),
    ):
        command = [sys.executable, os.path.join(ROOT, name), *flags, f"--out_dir={out}"]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
    return out
