"""
The `scaling` recipe beside the libraries one might use instead, on the same .npy, rows, steps and batch. By hand:

    pip install sae-lens dictionary_learning        # not among the requirements
    python tests/bench_libraries.py 'out/acts/mlp.0/train-*.npy' 'out/acts/mlp.0/val-*.npy'

All three minimise ||x - x_hat||^2 + lambda sum_i f_i ||W_dec_i|| with Adam, lambda rising over the first 5% of the steps,
the rate falling over the last 20% and gradients clipped to norm 1; each library goes by its own trainer and, for all else,
its own defaults. Prints for every lambda L0, variance explained and dead share on held-out rows, then the libraries'
variance explained at our L0 (interpolated in log L0) and the time of a training step, the three in turn, medians.
"""

import argparse
import glob
import os
import sys
import time
from importlib.metadata import version

import numpy as np
import torch
from dictionary_learning.trainers.standard import StandardTrainerAprilUpdate
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from sae import ActivationStore, SAEConfig, SparseAutoencoder, l1_at, lr_at  # noqa: E402


def ours(args, width, l1_coeff):
    sae = SparseAutoencoder(SAEConfig(width, args.n_features))
    optimizer = torch.optim.Adam(sae.parameters(), fused=True)

    def step(x, i):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(i, args.max_iters, args.learning_rate, sae.recipe)
        loss, _ = sae.loss(x, l1_at(i, args.max_iters, l1_coeff, sae.recipe))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()

    return step, sae.encode, sae.decode


def sae_lens(args, width, l1_coeff):
    warm_up, decay = args.max_iters // 20, args.max_iters // 5
    sae = StandardTrainingSAE(
        StandardTrainingSAEConfig(
            d_in=width, d_sae=args.n_features, l1_coefficient=l1_coeff, l1_warm_up_steps=warm_up, device="cpu"
        )
    )
    config = SAETrainerConfig(
        total_training_samples=args.max_iters * args.batch_size,
        train_batch_size_samples=args.batch_size,
        lr=args.learning_rate,
        lr_end=0.0,
        lr_decay_steps=decay,
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = SAETrainer(config, sae, iter(()))
    return lambda x, i: trainer._train_step(sae, x), sae.encode, sae.decode


def dictionary_learning(args, width, l1_coeff):
    trainer = StandardTrainerAprilUpdate(
        args.max_iters,
        width,
        args.n_features,
        layer=0,
        lm_name="gpt",
        lr=args.learning_rate,
        l1_penalty=l1_coeff,
        warmup_steps=0,
        sparsity_warmup_steps=args.max_iters // 20,
        decay_start=args.max_iters * 4 // 5,
        device="cpu",
    )
    return lambda x, i: trainer.update(i, x), trainer.ae.encode, trainer.ae.decode


@torch.no_grad()
def judged(encode, decode, rows):
    """-> L0, variance explained about the mean, share of features that are active on none of the rows."""
    error, active = 0.0, 0
    for x in rows.split(4096):
        f = encode(x)
        error += (decode(f) - x).square().sum().item()
        active = active + (f > 0).sum(0)
    explained = 1 - error / (rows - rows.mean(0)).square().sum().item()
    return active.sum().item() / len(rows), explained, (active == 0).float().mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train")
    parser.add_argument("held_out")
    parser.add_argument("--n_features", type=int, default=2048)
    parser.add_argument("--batch_size", type=int, default=2048)
    parser.add_argument("--max_iters", type=int, default=1500)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--l1_coeffs", default="3,5,8")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()

    store, held_out = (ActivationStore(sorted(glob.glob(pattern))) for pattern in (args.train, args.held_out))
    scale = (store.width / store.batch(0, 32768).square().sum(1).mean()).sqrt()
    rows = held_out.batch(0, min(65536, held_out.rows)) * scale
    makers = {"this project": ours, "SAELens": sae_lens, "dictionary_learning": dictionary_learning}
    print(f"torch {torch.__version__}, sae-lens {version('sae-lens')}, dictionary-learning "
          f"{version('dictionary-learning')}, {torch.get_num_threads()} threads; {store.width} -> {args.n_features:,}, "
          f"{args.max_iters:,} steps of {args.batch_size:,} rows, judged on {len(rows):,} held-out rows")  # fmt: skip
    results, steps = {name: [] for name in makers}, {}
    for l1_coeff in map(float, args.l1_coeffs.split(",")):
        for name, make in makers.items():
            torch.manual_seed(0)
            step, encode, decode = make(args, store.width, l1_coeff)
            for i in range(args.max_iters):
                step(store.batch(i * args.batch_size, args.batch_size) * scale, i)
            l0, explained, dead = judged(encode, decode, rows)
            results[name].append((l0, explained))
            steps[name] = step
            print(f"  lambda {l1_coeff:<5g}{name:<22}L0 {l0:6.1f}   variance explained {explained:.4f}   dead {dead:.2%}",
                  flush=True)  # fmt: skip
    l0s, ves = map(np.array, zip(*sorted(results["this project"])))
    for name in list(makers)[1:]:
        their_l0s, their_ves = map(np.array, zip(*sorted(results[name])))
        inside = (l0s >= their_l0s[0]) & (l0s <= their_l0s[-1])
        at_ours = np.interp(np.log(l0s[inside]), np.log(their_l0s), their_ves)
        for l0, explained, theirs in zip(l0s[inside], ves[inside], at_ours):
            print(f"  at L0 {l0:.1f}: this project {explained:.4f}, {name} {theirs:.4f}")
    times = {name: [] for name in makers}
    for k in range(args.rounds):
        x = store.batch(k * args.batch_size, args.batch_size) * scale
        for name, step in steps.items():
            start = time.perf_counter()
            step(x, args.max_iters - 1)
            times[name].append(time.perf_counter() - start)
    for name, t in times.items():
        ratio = np.median(t) / np.median(times["this project"])
        print(f"  {name:<22}{np.median(t) * 1e3:8.1f} ms a step   {ratio:5.2f} x the time of this project's")


if __name__ == "__main__":
    main()
