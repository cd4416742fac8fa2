"""
Does a change of the code change what it computes? By hand, with two checkouts (a git clone each):

    OMP_NUM_THREADS=1 python tests/same.py ../before ../after

Runs the same commands in both, with small settings and one thread: the model, the three recipes' autoencoders (with
resamplings that find dead features, killed once and resumed), an autoencoder on toy data, and every analysis. Prints
one line for each file that is compared: tensors are compared bit by bit, JSON byte by byte, and what the analyses print
line by line. Exits with 1 when anything differs.
"""

import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import time

import torch

TEXT = os.path.join(sysconfig.get_paths()["stdlib"], "email")
GPT = ["train_gpt.py", f"--dataset={TEXT}", "--vocab_size=700", "--block_size=64", "--max_iters=120"]
SAE = ["train_sae.py", "--n_features=700", "--n_acts=150000", "--batch_size=512", "--max_iters=160", "--save_interval=40"]
TOWARDS = ["--recipe=towards", "--learning_rate=3e-3", "--l1_coeff=20", "--dead_steps=10", "--resample=30,60,110"]
RUNS = {  # name of the autoencoder -> its flags
    "scaling": [],
    "towards": TOWARDS,
    "tied": ["--recipe=tied", "--l1_coeff=2", "--resample=50,100", "--dead_steps=5"],
    "resid": ["--site=resid", "--input_norm=token", "--pre_bias=yes", "--n_features=300"],
    "small": ["--n_features=200", "--decoder_norm=0.1"],
    "toy": ["--acts=toy", "--l1_coeff=3"],
    "whole": TOWARDS,  # not killed: what is printed tells of the resamplings
    "stream": ["--stream", "--n_features=300", "--max_iters=60"],
}
KILLED = ("scaling", "towards", "tied")
READ = ["--read_tokens=20000", "--eval_tokens=30000"]
ANALYSES = {  # what is printed is kept under this name -> arguments of analyze.py
    "report": ["report", "--show=4"],
    "report of towards": ["report", "--name=towards", "--show=2"],
    "report of tied": ["report", "--name=tied", "--show=2"],
    "report of resid": ["report", "--name=resid", "--show=2"],
    "feature": ["feature", "17"],
    "cause": ["cause"],
    "cause of resid": ["cause", "--name=resid"],
    "cause of a prompt": ["cause", "--prompt=def __init__(self", "--show=5"],
    "steer": ["steer", "--feature=17", "--prompt=import", "--value=-2,0,2"],
    "search": ["search", "import os", "def« f»(x):", "--without", "class A:", "--show=3"],
    "neurons": ["neurons"],
    "complete": ["complete", "--names=scaling,small", "--show=5"],
    "scaling": ["scaling", "--names=scaling,small"],
    "compare": ["compare", "small", "scaling", "--show=3"],
    "compare two models": ["compare", "scaling", "twin/sae/scaling"],
    "toy": ["toy", "--name=toy"],
}
PROGRESS = re.compile(r"/s  .*left$|^activations: |^data: .*MB$")  # lines that depend on the clock or on the disk


def run(checkout, out, command, kill_at=None):
    """Runs a script of a checkout on out; with kill_at (a file) it is killed once that is there, and resumed."""
    script, *flags = command
    line = [sys.executable, os.path.join(os.path.abspath(checkout), script), *flags, f"--out_dir={out}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if kill_at:
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, env=environment, cwd=os.path.dirname(out))
        while not os.path.exists(kill_at) and process.poll() is None:
            time.sleep(0.01)
        process.kill()
        process.wait()
        line.append("--resume")
    done = subprocess.run(line, capture_output=True, text=True, env=environment, cwd=os.path.dirname(out))
    if done.returncode:
        sys.exit(f"{' '.join(line)} failed:\n{done.stdout}{done.stderr}")
    return [text for text in done.stdout.splitlines() if not PROGRESS.search(text)]


def results(checkout, folder):
    """Runs everything -> {name: lines printed}, and the files in folder/out."""
    out, twin = os.path.join(folder, "out"), os.path.join(folder, "twin")
    printed = {"train_gpt.py": run(checkout, out, GPT), "another seed": run(checkout, twin, [*GPT, "--seed=2"])}
    run(checkout, twin, [*SAE, "--seed=2"])
    for name, flags in RUNS.items():
        command = [*SAE, f"--name={name}", *flags]
        if name in KILLED:
            run(checkout, out, command, kill_at=os.path.join(out, "sae", name, "sae.pt"))
        else:
            printed[f"train_sae.py {name}"] = run(checkout, out, command)
    for name, arguments in ANALYSES.items():
        printed[f"analyze.py, {name}"] = run(checkout, out, ["analyze.py", *arguments, *READ])
        print(f"  {checkout}: {name}", flush=True)
    return printed


def tensors(path):
    """Everything in a checkpoint that training made, by name; settings, which may be kept in another way, are left."""
    checkpoint, found = torch.load(path, weights_only=True), {}

    def walk(name, value):
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{name}.{key}", inner)
        elif isinstance(value, (list, tuple)):
            for i, inner in enumerate(value):
                walk(f"{name}.{i}", inner)
        else:
            found[name] = value

    for key in ("model", "weights", "scale", "optimizer", "step", "last_fired", "log"):
        walk(key, checkpoint.get(key))
    return found


def differences(before, after, name):
    """-> text that says how the two files differ, '' when they hold the same."""
    paths = [os.path.join(folder, name) for folder in (before, after)]
    if name.endswith(".pt"):
        a, b = map(tensors, paths)
        differ = [key for key in a.keys() | b.keys() if not equal(a.get(key), b.get(key))]
        return f"{len(differ)} of {len(a)} values differ: {sorted(differ)[:3]}" if differ else ""
    contents = []
    for folder, path in zip((before, after), paths):
        with open(path, "rb") as file:
            contents.append(file.read().replace(folder.encode(), b""))  # compare.json names its folders
    return "" if contents[0] == contents[1] else "other bytes"


def equal(a, b):
    if torch.is_tensor(a) and torch.is_tensor(b):
        return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and a == b


def main():
    checkouts = sys.argv[1:]
    if len(checkouts) != 2:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as before, tempfile.TemporaryDirectory() as after:
        printed = [results(checkout, folder) for checkout, folder in zip(checkouts, (before, after))]
        compared = []
        for folder, _, files in sorted(os.walk(before)):
            for file in sorted(files):
                if file.endswith((".pt", ".json", ".jsonl", ".npy", ".bin")):
                    compared.append(os.path.relpath(os.path.join(folder, file), before))
        failed = 0
        for name in compared:
            difference = differences(before, after, name)
            failed += bool(difference)
            print(f"{'DIFFERS' if difference else 'same':<8} {name}  {difference}")
        for name, lines in printed[0].items():
            pairs = list(zip(lines, printed[1][name]))
            differ = [pair for pair in pairs if pair[0].replace(before, "") != pair[1].replace(after, "")]
            count = len(differ) + abs(len(lines) - len(printed[1][name]))
            failed += bool(count)
            print(f"{'DIFFERS' if count else 'same':<8} {len(lines):3} lines printed by {name}")
            for a, b in differ[:2]:
                print(f"           before: {a}\n           after:  {b}")
    print(f"{failed} differ")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
