"""No run is lost: killed, interrupted, out of disk or gone wrong, and on several ranks."""

import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

import model
import train_gpt
import train_sae
from conftest import ROOT, SMALL_GPT, SMALL_SAE, TEXT, script
from model import GPT, GPTConfig, UserError
from sae import ActivationStream
from test_scripts import hashes

KILLS = int(os.environ.get("KILLS", 6))  # of each script; by hand: KILLS=100 python -m pytest tests/test_runs.py
OFTEN = ["--save_interval=1", "--resume"]

# A process that has torch and the scripts in memory and forks one that runs them, for every line it is given.
FORKS = """
import io, json, os, signal, sys
import analyze, model, torch, train_gpt, train_sae
torch.set_num_threads(1)
# what is otherwise imported with the first picture and the first step
analyze.Figure().savefig(io.BytesIO())
weight = torch.nn.Parameter(torch.ones(1))
weight.grad = torch.ones(1)
torch.optim.AdamW([weight], fused=True).step()
signal.signal(signal.SIGINT, signal.default_int_handler)  # started in the background, a process ignores it
for line in sys.stdin:
    name, log, *flags = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(1, 2)
        sys.stdout.reconfigure(line_buffering=True)
        sys.argv = [name, *flags]
        model.run(globals()[name].main)
        sys.stdout.flush()
        os._exit(0)
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


class Forks:
    """Runs scripts in processes that start at once, and kills them."""

    def __init__(self, log):
        command = [sys.executable, "-c", FORKS]
        self.log, env = log, os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT}
        self.server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def run(self, name, *flags, after=None, printed="", send=signal.SIGKILL):
        """-> seconds it ran, exit code, what it printed; a signal is sent so many seconds after it printed that."""
        self.log.write_text("")
        self.server.stdin.write(json.dumps([name, str(self.log), *map(str, flags)]) + "\n")
        self.server.stdin.flush()
        pid, start = int(self.server.stdout.readline()), time.time()
        if after is not None:
            while printed not in self.log.read_text(encoding="utf-8") and time.time() < start + 60:
                time.sleep(0.05)
            time.sleep(after)
            try:
                os.kill(pid, send)
            except ProcessLookupError:  # it was faster
                pass
        code = os.waitstatus_to_exitcode(int(self.server.stdout.readline()))
        return time.time() - start, code, self.log.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    forks = Forks(tmp_path_factory.mktemp("forks") / "log")
    yield forks
    forks.server.stdin.close()
    forks.server.wait()


def weights(path, key):
    return torch.load(path, weights_only=True)[key]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def text_file(folder):
    path = folder / "text.txt"
    path.write_text(TEXT * 3, encoding="utf-8")
    return path


# -----------------------------------------------------------------------------
# killed at any moment


def test_a_killed_training_of_the_model_ends_with_the_same_weights(forks, tmp_path):
    flags = [f"--dataset={text_file(tmp_path)}", *SMALL_GPT, "--max_iters=30", *OFTEN]
    whole, code, _ = forks.run("train_gpt", f"--out_dir={tmp_path / 'whole'}", *flags)
    assert code == 0
    moments, stages = random.Random(1), set()
    for k in range(KILLS):
        out = tmp_path / str(k)
        forks.run("train_gpt", f"--out_dir={out}", *flags, after=moments.uniform(0, whole))
        stages.add("gpt.pt" if (out / "gpt.pt").exists() else "data" if (out / "data.json").exists() else "start")
        if (out / "gpt.pt").exists():
            assert 0 < torch.load(out / "gpt.pt", weights_only=True)["step"] <= 30
        _, code, log = forks.run("train_gpt", f"--out_dir={out}", *flags)
        assert code == 0, log
        assert same(weights(out / "gpt.pt", "model"), weights(tmp_path / "whole/gpt.pt", "model")), k
        for name in ("train.bin", "val.bin", "tokenizer.json", "gpt.jsonl"):
            assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
        shutil.rmtree(out)
    assert len(stages) > 1


@pytest.mark.parametrize("recipe", ["scaling", "towards"])
def test_a_killed_training_of_the_autoencoder_ends_with_the_same_weights(forks, trained, tmp_path, recipe):
    """Activations are dumped anew each time, in several files, and towards resamples on the way."""
    flags = [*SMALL_SAE, "--n_acts=300000", f"--recipe={recipe}", "--l1_coeff=30", *OFTEN]

    def fresh(name):
        out = tmp_path / name
        out.mkdir()
        for file in ("gpt.pt", "tokenizer.json", "train.bin", "val.bin", "data.json"):
            shutil.copy(trained / file, out)
        return out

    whole, code, log = forks.run("train_sae", f"--out_dir={fresh('whole')}", *flags)
    assert code == 0, log
    reference = torch.load(tmp_path / f"whole/sae/{recipe}/sae.pt", weights_only=True)
    moments, stages = random.Random(2), set()
    for k in range(KILLS // 2):
        out = fresh(str(k))
        forks.run("train_sae", f"--out_dir={out}", *flags, after=moments.uniform(0, whole))
        stages.add((len(list(out.rglob("acts/mlp.0/*.npy"))), (out / f"sae/{recipe}/sae.pt").exists()))
        for path in (out / "acts").rglob("*.npy"):  # whatever has its final name is whole
            assert path.read_bytes() == (tmp_path / "whole/acts/mlp.0" / path.name).read_bytes()
        _, code, log = forks.run("train_sae", f"--out_dir={out}", *flags)
        assert code == 0, log
        checkpoint = torch.load(out / f"sae/{recipe}/sae.pt", weights_only=True)
        assert same(checkpoint["weights"], reference["weights"]), k
        assert torch.equal(checkpoint["last_fired"], reference["last_fired"]) and checkpoint["log"] == reference["log"]
        shutil.rmtree(out)
    assert len(stages) > 1


def test_a_killed_analysis_leaves_nothing_half_written(forks, trained, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    whole, code, _ = forks.run("analyze", f"--out_dir={out}", "--show=1")
    assert code == 0
    good = hashes(out)
    moments = random.Random(3)
    for k in range(KILLS):
        for path in (out / "sae/scaling").glob("*.*"):
            if path.suffix in (".html", ".png") or path.name == "metrics.json":
                path.unlink()
        forks.run("analyze", f"--out_dir={out}", "--show=1", after=moments.uniform(0, whole))
        found = {name: digest for name, digest in hashes(out).items() if not name.endswith(".tmp")}
        assert found.items() <= good.items(), k
    assert forks.run("analyze", f"--out_dir={out}", "--show=1")[1] == 0
    assert {name: digest for name, digest in hashes(out).items() if not name.endswith(".tmp")} == good


# -----------------------------------------------------------------------------
# interrupted


@pytest.mark.parametrize("send", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("name", ["gpt.pt", "sae/scaling/sae.pt"])
def test_an_interrupted_run_saves_and_says_how_to_go_on(forks, trained, tmp_path, name, send):
    out = shutil.copytree(trained, tmp_path / "out")
    os.remove(out / name)
    command = ["train_sae", *SMALL_SAE, "--max_iters=5000", "--save_interval=5000"]
    if name == "gpt.pt":
        flags = ["--max_iters=3000", "--save_interval=3000"]
        command = ["train_gpt", f"--dataset={trained.parent / 'text.txt'}", *SMALL_GPT, *flags]
    _, code, log = forks.run(*command, f"--out_dir={out}", printed=", on cpu", after=0.5, send=send)
    assert code == 130 and "Traceback" not in log, log
    step = torch.load(out / name, weights_only=True)["step"]
    assert 0 < step < 3000 and f"step {step:,}, which is saved" in log and "--resume" in log


def test_an_interrupt_before_the_first_step_is_one_line(forks, tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"{i} {i * i % 977}\n" for i in range(2_000_000)))
    flags = [f"--dataset={tmp_path / 'text.txt'}", f"--out_dir={tmp_path / 'out'}"]
    _, code, log = forks.run("train_gpt", *flags, after=1.0, send=signal.SIGINT)
    assert code == 130 and "interrupted" in log and "Traceback" not in log


# -----------------------------------------------------------------------------
# resumed


@pytest.fixture
def half(trained, tmp_path):
    """A copy of `trained` whose autoencoder has done 40 of 60 steps."""
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train_sae.steps", lambda first, *_: range(first, 40))
        assert script("train_sae.py", f"--out_dir={out}", *SMALL_SAE).returncode == 130
    return out


def test_a_resumed_run_is_the_uninterrupted_one(half, trained):
    done = script("train_sae.py", f"--out_dir={half}", *SMALL_SAE, "--resume")
    assert done.returncode == 0 and "step 40" in done.stdout
    a, b = (torch.load(out / "sae/scaling/sae.pt", weights_only=True) for out in (half, trained))
    assert same(a["weights"], b["weights"]) and a["log"] == b["log"] and a["step"] == 60
    assert (half / "sae/scaling/log.jsonl").read_bytes() == (trained / "sae/scaling/log.jsonl").read_bytes()
    before = hashes(half)
    shutil.rmtree(half / "acts")
    done = script("train_sae.py", f"--out_dir={half}", *SMALL_SAE, "--resume")
    assert done.returncode == 0 and "is finished" in done.stdout and not (half / "acts").exists()
    assert hashes(half).items() <= before.items()


def test_more_steps_are_allowed_and_said(half):
    done = script("train_sae.py", f"--out_dir={half}", *SMALL_SAE, "--resume", "--max_iters=80")
    assert done.returncode == 0 and "--max_iters=80 instead of 60" in done.stdout
    assert torch.load(half / "sae/scaling/sae.pt", weights_only=True)["step"] == 80


def test_a_run_of_the_model_goes_on_beyond_its_end(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "out")
    flags = [f"--out_dir={tmp_path / 'out'}", f"--dataset={trained.parent / 'text.txt'}", *SMALL_GPT, "--resume"]
    assert "is finished" in script("train_gpt.py", *flags).stdout
    done = script("train_gpt.py", *flags, "--max_iters=40")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out/gpt.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 10, 20, 30, 30, 40]  # 30 was the end, and is on the way


@pytest.mark.parametrize(
    "change, words",
    [
        (["--n_features=97"], ["97", "96"]),
        (["--recipe=tied", "--name=scaling"], ["tied", "scaling"]),
        (["--seed=8"], ["8", "1337"]),
        (["--batch_size=64"], ["64", "128"]),
        (["--learning_rate=0.5"], ["0.5", "0.001"]),
        (["--l1_coeff=7"], ["7", "5"]),
        (["--n_acts=5000"], ["5000", "4000"]),
        (["--max_iters=50"], ["50", "60"]),
        (["--stream"], ["True", "False"]),
        (["other model"], ["other activations"]),
        (["other rows"], ["other activations"]),
        (["damaged"], ["damaged"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_settings_that_would_make_another_run_are_refused(half, change, words):
    path = half / "sae/scaling/sae.pt"
    if not change[0].startswith("--"):
        checkpoint = torch.load(path, weights_only=True)
        if change == ["damaged"]:
            checkpoint["optimizer"] = {"state": 5}
        else:
            checkpoint["source"] |= {"gpt": "another"} if change == ["other model"] else {"rows": 17}
        torch.save(checkpoint, path)
        change = []
    before = hashes(half)
    done = script("train_sae.py", f"--out_dir={half}", *SMALL_SAE, "--resume", *change)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--resume" in done.stderr, done.stderr
    for word in words:
        assert word in done.stderr
    assert hashes(half) == before


@pytest.mark.parametrize(
    "flag, shortest, times, expected",
    [
        ("auto", 50, 500, {1: 50, 1500: 50, 25_000: 50, 100_000: 200, 1_000_000: 2000}),
        ("auto", 500, 20, {1: 500, 1500: 500, 10_000: 500, 10_039: 501, 1_000_000: 50_000}),
        ("auto", 100, 100, {1000: 100, 30_000: 300}),
        (7, 50, 500, {1: 7, 1_000_000: 7}),
    ],
)
def test_long_runs_log_measure_and_save_less_often_unless_a_flag_says_how_often(flag, shortest, times, expected):
    found = {max_iters: model.interval(flag, max_iters, shortest, times) for max_iters in expected}
    assert found == expected


@pytest.mark.parametrize("saved", ["auto", 20, 50])
def test_a_run_goes_on_whether_its_checkpoint_kept_auto_or_a_number(half, saved):
    """Versions before `auto` kept numbers; what is computed is the same whichever there is."""
    path = half / "sae/scaling/sae.pt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["args"] |= {"log_interval": saved, "save_interval": saved}
    torch.save(checkpoint, path)
    flags = [flag for flag in SMALL_SAE if not flag.startswith("--log_interval")]
    done = script("train_sae.py", f"--out_dir={half}", *flags, "--resume", "--max_iters=110")
    assert done.returncode == 0, done.stderr
    log = [json.loads(line) for line in (half / "sae/scaling/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [20, 40, 50, 100, 110]  # from 40 on as auto has it
    args = torch.load(path, weights_only=True)["args"]
    assert args["log_interval"] == args["save_interval"] == "auto"


@pytest.mark.parametrize("name, flag", [("train_sae.py", "log"), ("train_sae.py", "save"), ("train_gpt.py", "eval")])
def test_an_interval_is_auto_or_a_whole_number(tmp_path, name, flag):
    for value in ("0", "often", "1.5"):
        done = script(name, f"--out_dir={tmp_path}", f"--{flag}_interval={value}")
        assert done.returncode == 2 and f"--{flag}_interval" in done.stderr and done.stderr.count("\n") == 1


def test_a_model_is_not_resumed_on_other_text(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "out")
    (tmp_path / "text.txt").write_text(TEXT[::-1])
    flags = [f"--out_dir={tmp_path / 'out'}", *SMALL_GPT, "--max_iters=40", "--resume"]
    done = script("train_gpt.py", *flags, f"--dataset={tmp_path / 'text.txt'}")
    assert done.returncode == 2 and "trained on other files" in done.stderr and "text.txt" in done.stderr


def test_the_same_text_is_resumed_wherever_it_lies_and_however_old_it_is(tmp_path, monkeypatch):
    flags = [f"--out_dir={tmp_path / 'out'}", *SMALL_GPT, "--resume"]
    (tmp_path / "text.txt").write_text(TEXT)
    assert script("train_gpt.py", *flags, f"--dataset={tmp_path / 'text.txt'}", "--max_iters=2").returncode == 0
    os.utime(tmp_path / "text.txt", (1, 1))
    monkeypatch.chdir(tmp_path)
    made = os.stat("out/train.bin").st_mtime_ns
    done = script("train_gpt.py", *flags, "--dataset=./text.txt", "--max_iters=4")
    assert done.returncode == 0 and "going on" in done.stdout and os.stat("out/train.bin").st_mtime_ns == made
    monkeypatch.setattr(train_gpt, "READING", train_gpt.READING + 1)
    done = script("train_gpt.py", *flags, "--dataset=text.txt", "--max_iters=6")
    assert done.returncode == 2 and "another version" in done.stderr and os.stat("out/train.bin").st_mtime_ns == made
    done = script("train_gpt.py", *flags[:-1], "--dataset=text.txt", "--max_iters=6")
    assert done.returncode == 0 and os.stat("out/train.bin").st_mtime_ns > made  # made anew, not kept in silence


def test_a_model_that_cannot_be_resumed_keeps_its_data(tmp_path):
    flags = [f"--out_dir={tmp_path / 'out'}", f"--dataset={tmp_path / 'text.txt'}", *SMALL_GPT, "--max_iters=2"]
    (tmp_path / "text.txt").write_text(TEXT)
    assert script("train_gpt.py", *flags).returncode == 0
    (tmp_path / "text.txt").write_text(TEXT[::-1])
    before = hashes(tmp_path / "out")
    done = script("train_gpt.py", *flags[:-1], "--max_iters=4", "--resume")
    assert done.returncode == 2 and "trained on other files" in done.stderr
    assert hashes(tmp_path / "out") == before


def test_a_folder_of_text_may_hold_out_dir(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    flags = [f"--out_dir={tmp_path / 'out'}", f"--dataset={tmp_path}", *SMALL_GPT, "--max_iters=2"]
    assert script("train_gpt.py", *flags).returncode == 0
    done = script("train_gpt.py", *flags, "--resume")
    assert done.returncode == 0 and "is finished" in done.stdout, done.stderr


def test_a_model_and_data_that_do_not_belong_together_are_not_used(trained, tmp_path):
    """A kill between new data and the first checkpoint on them leaves such a pair."""
    shutil.copytree(trained, tmp_path / "out")
    (tmp_path / "text.txt").write_text(TEXT[::-1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "GPT", lambda config: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            script("train_gpt.py", f"--out_dir={tmp_path / 'out'}", *SMALL_GPT, f"--dataset={tmp_path / 'text.txt'}")
    for command in (("train_sae.py", *SMALL_SAE), ("analyze.py",)):
        done = script(*command, f"--out_dir={tmp_path / 'out'}")
        assert done.returncode == 2 and "other data" in done.stderr and "train_gpt.py" in done.stderr


# -----------------------------------------------------------------------------
# side by side

HOLD = "import sys, model; print(getattr(model, sys.argv[1])(sys.argv[2]), flush=True); sys.stdin.read()"


@pytest.fixture
def another_process():
    """start(function, folder): a process that called model.lock_alone or lock_shared, and lives on."""
    processes = []

    def start(function, folder):
        command = [sys.executable, "-c", HOLD, function, str(folder)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True)
        processes.append(process)
        assert process.stdout.readline().strip() in ("True", "None")
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.skipif(sys.platform == "win32", reason="no file locks")
@pytest.mark.parametrize("command", [("train_sae.py", *SMALL_SAE), ("train_gpt.py", *SMALL_GPT)])
def test_a_second_run_of_the_same_name_is_refused_until_the_first_has_ended_however_it_ends(
    trained, tmp_path, another_process, command
):
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    gpt = command[0] == "train_gpt.py"
    before = hashes(out)
    first = another_process("lock_alone", out if gpt else out / "sae/scaling")
    flags = [f"--dataset={trained.parent / 'text.txt'}"] if gpt else []
    done = script(*command, f"--out_dir={out}", *flags)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "another run is training" in done.stderr
    assert hashes(out) == before
    first.kill()
    first.wait()
    done = script(*command, f"--out_dir={out}", *flags)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="no file locks")
def test_activations_that_another_run_may_read_are_kept_and_those_of_the_same_model_shared(
    trained, tmp_path, another_process
):
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    another_process("lock_shared", out / "acts/mlp.0")
    for flags in (["--seed=3"], ["--n_acts=1"], [f"--n_acts={2**17 + 1}"]):
        done = script("train_sae.py", *SMALL_SAE, f"--out_dir={out}", "--name=other", *flags)
        assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in out.rglob("*.npy")) == ["train-000.npy", "train-001.npy", "val-000.npy"]
    before = hashes(out)
    checkpoint = torch.load(out / "gpt.pt", weights_only=True)
    checkpoint["model"]["wte.weight"] += 0.01
    torch.save(checkpoint, out / "gpt.pt")
    done = script("train_sae.py", *SMALL_SAE, f"--out_dir={out}", "--name=other")
    assert done.returncode == 2 and "another run is reading" in done.stderr
    after = hashes(out)
    assert {name for name in after if after[name] != before[name]} == {"gpt.pt"}


def test_runs_of_other_names_that_start_at_once_write_the_activations_together(trained, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for file in ("gpt.pt", "tokenizer.json", "train.bin", "val.bin", "data.json"):
        shutil.copy(trained / file, out)
    runs = []
    for name in ("a", "b", "scaling"):
        command = [sys.executable, os.path.join(ROOT, "train_sae.py"), f"--name={name}", f"--out_dir={out}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        runs.append(subprocess.Popen([*command, *SMALL_SAE], stderr=subprocess.PIPE, text=True, env=environment))
    for process in runs:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    shard = "acts/mlp.0/train-000.npy"
    assert (out / shard).read_bytes() == (trained / shard).read_bytes()
    assert sorted(path.name for path in (out / "acts/mlp.0").iterdir()) == sorted(
        path.name for path in (trained / "acts/mlp.0").iterdir()
    )
    expected = torch.load(trained / "sae/scaling/sae.pt", weights_only=True)["weights"]
    for name in ("a", "b", "scaling"):
        found = torch.load(out / "sae" / name / "sae.pt", weights_only=True)["weights"]
        assert same(found, expected)


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "x"

    def write_slowly(file):
        file.write(b"slow")
        model.write_atomic(path, lambda other: other.write(b"quick"))  # another one, in between
        assert path.read_bytes() == b"quick"

    model.write_atomic(path, write_slowly)
    assert path.read_bytes() == b"slow" and os.listdir(tmp_path) == ["x"]


# -----------------------------------------------------------------------------
# disks that are full, numbers that go wrong


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("name", ["gpt.pt", "gpt.jsonl", "sae/scaling/sae.pt", "acts/mlp.0/train-000.npy"])
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stands(trained, tmp_path, monkeypatch, name):
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    command = ("train_sae.py", *SMALL_SAE)
    if name.startswith("gpt"):
        command = ("train_gpt.py", *SMALL_GPT, f"--dataset={trained.parent / 'text.txt'}", "--save_interval=10")
    if name.startswith("acts"):
        os.remove(out / name)
    before = hashes(out)
    monkeypatch.setattr("model.uuid.uuid4", lambda: SimpleNamespace(hex="full disk"))
    os.symlink("/dev/full", f"{out / name}.full dis.tmp")
    done = script(*command, f"--out_dir={out}")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert os.path.basename(name) in done.stderr and ("space" in done.stderr or "disk" in done.stderr)
    after = hashes(out)
    assert not list(out.rglob("*.tmp"))
    for path in ("gpt.pt", "sae/scaling/sae.pt"):
        assert after[path] == before[path]


@pytest.mark.parametrize("script_name", ["train_gpt.py", "train_sae.py"])
def test_a_loss_that_is_no_number_stops_the_run_and_names_the_last_good_checkpoint(
    trained, tmp_path, monkeypatch, script_name
):
    """The rate explodes at step 25; save_interval is 20, lines of the log come every 10 or 20 steps."""
    shutil.copytree(trained, tmp_path / "out")
    module, path = script_name.removesuffix(".py"), "gpt.pt" if script_name == "train_gpt.py" else "sae/scaling/sae.pt"
    function = "learning_rate" if module == "train_gpt" else "lr_at"
    monkeypatch.setattr(f"{module}.{function}", lambda step, *rest: 1e-3 if step < 25 else 1e38)
    flags = [f"--dataset={trained.parent / 'text.txt'}", *SMALL_GPT] if module == "train_gpt" else SMALL_SAE
    done = script(script_name, f"--out_dir={tmp_path / 'out'}", *flags, "--save_interval=20")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stdout + done.stderr
    assert "step" in done.stderr and "learning rate 1e+38" in done.stderr
    assert f"{path} is the last good checkpoint" in done.stderr.replace(os.sep, "/")
    checkpoint = torch.load(tmp_path / "out" / path, weights_only=True)
    assert checkpoint["step"] == 20
    values = checkpoint["model" if module == "train_gpt" else "weights"].values()
    assert all(torch.isfinite(value).all() for value in values)


def test_a_resampling_of_weights_that_are_no_numbers_stops_the_run(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "out")
    flags = ["--recipe=towards", "--resample=7", "--dead_steps=2", "--learning_rate=1e18", "--log_interval=50"]
    done = script("train_sae.py", f"--out_dir={tmp_path / 'out'}", *SMALL_SAE, *flags)
    assert done.returncode == 2 and "step 7" in done.stderr and done.stderr.count("\n") == 1, done.stderr


def own(folder, rows, *flags):
    np.save(folder / "a.npy", rows)
    return script("train_sae.py", f"--acts={folder}/*.npy", f"--out_dir={folder / 'out'}", *SMALL_SAE, *flags)


def test_activations_that_do_not_vary_are_refused(tmp_path):
    done = own(tmp_path, np.full((300, 8), 3.0, dtype=np.float32))
    assert done.returncode == 2 and "all the same" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("recipe", ["scaling", "towards", "tied"])
def test_constant_columns_and_more_features_than_rows_train(tmp_path, recipe):
    rows = np.random.default_rng(0).random((150, 8), dtype=np.float32)
    rows[:, :3] = (0.0, 5.0, -2.0)
    done = own(tmp_path, rows, f"--recipe={recipe}", "--n_features=400")
    assert done.returncode == 0, done.stderr
    log = [json.loads(line) for line in (tmp_path / f"out/sae/{recipe}/log.jsonl").read_text().splitlines()]
    assert all(math.isfinite(value) for row in log for value in row.values())


# -----------------------------------------------------------------------------
# streamed, and on several ranks


@pytest.mark.parametrize("dtype", ["<f2", "<i8"])
def test_an_array_of_a_file_is_the_same_on_every_device(tmp_path, dtype):
    np.save(tmp_path / "a.npy", np.arange(12).reshape(4, 3).astype(dtype))
    array = np.load(tmp_path / "a.npy")
    for name in ["cpu", "cuda"][:1 + torch.cuda.is_available()]:
        if name == "cuda":  # of a GPU's shuffled slices: mapped, and not to be written to
            array = np.load(tmp_path / "a.npy", mmap_mode="r")
        found = model.to_device(array, torch.device(name))
        assert found.device.type == name and found.tolist() == np.arange(12).reshape(4, 3).tolist()
        assert found.dtype == (torch.float16 if dtype == "<f2" else torch.int64)


def test_a_stream_writes_no_activations_and_resumes(trained, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    shutil.rmtree(out / "acts")
    flags = [f"--out_dir={out}", *SMALL_SAE, "--stream", "--name=whole"]
    assert script("train_sae.py", *flags).returncode == 0
    assert script("analyze.py", f"--out_dir={out}", "--name=whole", "--show=1").returncode == 0
    flags[-1] = "--name=halves"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train_sae.steps", lambda first, *_: range(first, 40))
        assert script("train_sae.py", *flags).returncode == 130
    assert script("train_sae.py", *flags, "--resume").returncode == 0
    assert not (out / "acts").exists()
    assert same(*(weights(out / f"sae/{name}/sae.pt", "weights") for name in ("whole", "halves")))


@pytest.fixture
def on_two_ranks(tmp_path):
    """on_two_ranks(function): function(rank) in two processes that have joined -> what each returned."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")

    def process(function, rank):
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=rank, world_size=2)
        torch.save(function(rank), tmp_path / f"{rank}.result")
        if dist.is_initialized():
            dist.destroy_process_group()

    def start(function):
        context = multiprocessing.get_context("fork")
        processes = [context.Process(target=process, args=(function, rank)) for rank in (0, 1)]
        for one in processes:
            one.start()
        for one in processes:
            one.join(60)
            one.kill()  # nothing, when it has ended
        assert [one.exitcode for one in processes] == [0, 0]
        return [torch.load(tmp_path / f"{rank}.result", weights_only=True) for rank in (0, 1)]

    return start


def many_rows(n_contexts=2000):
    """make(start, n, ...) of a tiny model's rows, and a list that grows by the contexts it computes."""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(block_size=16, vocab_size=50, n_head=2, n_embd=8)).requires_grad_(False)
    tokens = np.random.default_rng(0).integers(0, 50, 16 * n_contexts).astype(np.uint16)
    computed, activations = [], gpt.activations
    gpt.activations = lambda idx, site: (computed.append(len(idx)), activations(idx, site))[1]
    return partial(train_sae.gpt_rows, gpt, tokens, "mlp.0"), computed


def test_each_rank_computes_its_share_of_a_stream_and_every_one_gets_all(on_two_ranks):
    make, computed = many_rows()
    whole = ActivationStream(make, 32, shard_rows=16_000)
    batches = [whole.batch(position, 6000) for position in range(0, 30_000, 6000)]
    sample = whole.sample(500, (1, 2))
    for batch in batches:
        assert batch.ne(0).any(1).all()

    def on(rank):
        computed.clear()

        def make_together(start, n):
            return train_sae.gathered("mlp.0", make(start, n, rank, 2))

        stream = ActivationStream(make_together, 32, shard_rows=16_000)
        shares = []
        for position in range(0, 30_000, 6000):
            shares.append(stream.batch(position, 6000, rank, ranks=2))
        return shares, sum(computed), stream.sample(500, (1, 2))

    results = on_two_ranks(on)
    for expected, *shares in zip(batches, results[0][0], results[1][0]):
        assert torch.equal(torch.cat(shares), expected)
    assert [n_computed for _, n_computed, _ in results] == [2 * 1024, 2 * 976]  # of two shards, 512 at once
    assert all(torch.equal(drawn, sample) for *_, drawn in results)


def test_rows_of_one_rank_that_are_no_numbers_are_refused_on_all(on_two_ranks):
    def on(rank):
        with pytest.raises(UserError, match="activations of mlp.0 are NaN"):
            train_sae.gathered("mlp.0", torch.full((3, 2), math.nan if rank else 0.0).half())

    on_two_ranks(on)


def test_ranks_write_the_activations_together(on_two_ranks, tmp_path, monkeypatch):
    monkeypatch.setattr(train_sae, "SHARD_ROWS", 1000)
    make, _ = many_rows(100)

    def dump(folder, written):
        def write(split, start, n):
            written.append((split, start))
            return make(start + 7 * (split == "val"), n)

        return train_sae.dump(str(tmp_path / folder), {"width": 32}, write, 3500)

    def on(rank):
        written = []
        return *dump("two", written), written

    train, val = dump("one", [])
    (train_0, val_0, written_0), (train_1, val_1, written_1) = on_two_ranks(on)
    assert written_0 == [("train", 0), ("train", 2000), ("val", 0)] and written_1 == [("train", 1000), ("train", 3000)]
    assert (train_0, val_0) == (train_1, val_1) and len(train_0) == 4
    for one, two in zip(train + val, train_0 + val_0):
        assert np.array_equal(np.load(one), np.load(two))


def test_every_rank_takes_the_values_of_rank_0_however_they_lie_in_memory(on_two_ranks):
    def on(rank):
        tensors = [torch.arange(6.0).view(2, 3) + rank, (torch.arange(6.0).view(2, 3) - rank).t()]
        model.same_on_all_ranks(tensors)
        return tensors

    expected = [torch.arange(6.0).view(2, 3), torch.arange(6.0).view(2, 3).t()]
    for found in on_two_ranks(on):
        assert all(map(torch.equal, found, expected))


def test_ranks_agree_on_a_stop_every_16th_step_and_one_alone_stops_at_once(on_two_ranks):
    def done(stopping, start):
        found = []
        for step in model.steps(start, 100):
            found.append(step)
            if stopping and step == 20:
                os.kill(os.getpid(), signal.SIGINT)
        return found

    assert done(True, 9) == list(range(9, 21))
    assert on_two_ranks(lambda rank: done(rank == 1, 9)) == [list(range(9, 32))] * 2


def test_the_process_group_ends_with_the_script_and_with_an_error(on_two_ranks):
    def on(rank):
        def main():
            if rank == 1:
                raise UserError("of one rank alone")

        status = 0
        try:
            model.run(main)
        except SystemExit as stop:
            status = stop.code
        return status, dist.is_initialized()

    assert on_two_ranks(on) == [(0, False), (2, False)]


def test_without_a_compiler_the_run_goes_on_and_says_so(trained, tmp_path, monkeypatch):
    def compile_nothing(function):
        def fail(*args):
            raise RuntimeError("No working C++ compiler found in ...\nand more lines")

        return fail

    monkeypatch.setattr("torch.compile", compile_nothing)
    shutil.copytree(trained, tmp_path / "out")
    done = script("train_sae.py", f"--out_dir={tmp_path / 'out'}", *SMALL_SAE, "--compile=yes")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("goes on without: No working C++ compiler") == 1 and "more lines" not in done.stdout
    path = "sae/scaling/sae.pt"
    assert same(weights(tmp_path / "out" / path, "weights"), weights(trained / path, "weights"))


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def test_a_signal_to_one_rank_stops_all_after_the_same_step(trained, tmp_path):
    # one write, so that the ranks' lines do not run into one another
    out, ranks = tmp_path / "out", 'import os, sys; sys.stderr.write(f"{os.environ[\'RANK\']} {os.getpid()}\\n")\n'
    shutil.copytree(trained, out)
    (tmp_path / "start.py").write_text(
        f"{ranks}import sys; sys.path.insert(0, {ROOT!r})\nimport train_sae\nfrom model import run\nrun(train_sae.main)"
    )
    command = [*TORCHRUN, str(tmp_path / "start.py"), f"--out_dir={out}", *SMALL_SAE, "--max_iters=1000000"]
    with open(tmp_path / "log", "w+") as log:
        torchrun = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
        while "sae: " not in (text := (tmp_path / "log").read_text()) and torchrun.poll() is None:
            time.sleep(0.1)
        time.sleep(0.5)
        os.kill(int(re.search(r"^1 (\d+)$", text, re.M).group(1)), signal.SIGINT)
        torchrun.wait()
    stopped = re.findall(r"interrupted at step ([\d,]+), which is saved", (tmp_path / "log").read_text())
    assert len(stopped) == 2 and stopped[0] == stopped[1]
    saved = torch.load(out / "sae/scaling/sae.pt", weights_only=True)
    assert saved["step"] == int(stopped[0].replace(",", "")) > 0


@pytest.mark.parametrize(
    "name", ["train_gpt.py", "train_sae.py --recipe=towards --l1_coeff=30 --stream"]
)
def test_two_ranks_are_one_with_the_doubled_batch(trained, tmp_path, name):
    """Started in the middle and resumed, with resampling on the way; the second rank is silent."""
    name, *flags = name.split()
    flags += SMALL_GPT + [f"--dataset={trained.parent / 'text.txt'}"] if name == "train_gpt.py" else SMALL_SAE
    size = 8 if name == "train_gpt.py" else 128
    one, two = tmp_path / "one", tmp_path / "two"
    for out in (one, two):
        shutil.copytree(trained, out)
    done = script(name, f"--out_dir={one}", *flags, f"--batch_size={size}")
    assert done.returncode == 0, done.stderr
    command = [*TORCHRUN, os.path.join(ROOT, name), f"--out_dir={two}", *flags, f"--batch_size={size // 2}"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    steps = 30 if name == "train_gpt.py" else 60
    for more in ([f"--max_iters={steps}"], [f"--max_iters={steps}", "--resume"]):
        ran = subprocess.run([*command, *more], capture_output=True, text=True, env=env)
        assert ran.returncode == 0, ran.stderr
    assert "is finished" in ran.stdout and ran.stdout.count("is finished") == 1
    refused = script(name, f"--out_dir={two}", *flags, f"--batch_size={size // 2}", "--max_iters=90", "--resume")
    assert refused.returncode == 2 and f"--batch_size={size // 2}" in refused.stderr  # one rank alone is another run
    path, key = ("gpt.pt", "model") if name == "train_gpt.py" else ("sae/towards/sae.pt", "weights")
    a, b = weights(one / path, key), weights(two / path, key)
    for which in a:
        if which.endswith("c_attn.bias"):  # the softmax does not see the keys' bias: Adam makes steps of rounding errors
            for state in (a, b):
                state[which].view(3, -1)[1] = 0
        if name == "train_sae.py":
            torch.testing.assert_close(a[which], b[which], rtol=2e-3, atol=2e-5, msg=which)
        # Adam makes whole steps of slopes that are rounding errors: a few entries may differ by more
        assert (a[which] - b[which]).norm() <= 5e-3 * b[which].norm(), which
