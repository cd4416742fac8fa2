"""
How fast is the exact sparse step? By hand, on a quiet machine:

    python tests/bench.py                          # 512 -> 4,096 features, batch 4,096, about 25 active
    python tests/bench.py --n_features=16384 --recipe=towards

One process, the three in turn, medians: a whole training step (loss, gradients, clip or projection, Adam) dense and
sparse, and the encoder's product alone, which no exact step can do without. The absolute times are this machine's; the
ratios carry over.
"""

import argparse
import os
import sys
import time

import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from sae import RECIPES, SparseAutoencoder  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d_in", type=int, default=512)
    parser.add_argument("--n_features", type=int, default=4096)
    parser.add_argument("--batch_size", type=int, default=4096)
    parser.add_argument("--l0", type=float, default=25)
    parser.add_argument("--recipe", default="scaling", choices=RECIPES)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()

    torch.manual_seed(0)
    sae = SparseAutoencoder(args.d_in, args.n_features, args.recipe)
    x = torch.randn(args.batch_size, args.d_in)
    with torch.no_grad():  # a bias that leaves about l0 features active
        pre = (x[:512] @ sae.W_enc).flatten()
        sae.b_enc -= pre.kthvalue(round(len(pre) * (1 - args.l0 / args.n_features))).values
    optimizer = torch.optim.Adam(sae.parameters(), lr=0.0, fused=True)

    def step(sparse):
        loss, stats = sae.loss(x, 1.0, sparse=sparse)
        optimizer.zero_grad()
        loss.backward()
        sae.remove_parallel_gradient()
        if args.recipe == "scaling":
            torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        sae.normalize_decoder()
        return stats["l0"].item()

    def gradients(sparse):
        step(sparse)
        return [p.grad.clone() for p in sae.parameters()]

    l0, dense, sparse = step(False), gradients(False), gradients(True)
    worst = max(((a - b).norm() / b.norm()).item() for a, b in zip(sparse, dense))
    W_enc, out = sae.W_enc.detach(), torch.empty(args.batch_size, args.n_features)
    runs = {
        "dense step": lambda: step(False),
        "sparse step": lambda: step(True),
        "encoder product": lambda: torch.mm(x, W_enc, out=out),
    }
    times = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, fn in runs.items():
            start = time.perf_counter()
            fn()
            times[name].append(time.perf_counter() - start)
    medians = {name: float(np.median(t)) for name, t in times.items()}
    print(
        f"{args.recipe}, {args.d_in} -> {args.n_features:,}, batch {args.batch_size:,}, L0 {l0:.1f}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}; gradients differ by {worst:.1e} (relative)"
    )
    for name, t in medians.items():
        print(
            f"  {name:<16}{t * 1e3:9.1f} ms   {medians['dense step'] / t:5.2f} x the dense step's speed   "
            f"{t / medians['encoder product']:5.2f} x the encoder product's time"
        )


if __name__ == "__main__":
    main()
