"""
How fast is a training step? By hand, on a quiet machine:

    python tests/bench.py                          # 512 -> 4,096 features, batch 4,096, about 25 active
    python tests/bench.py --n_features=16384 --recipe=towards
    python tests/bench.py --device=cuda --batch_size=8192           # the dense step, in bfloat16 and compiled

One process, the three in turn, medians: a whole training step (loss, gradients, clip or projection, Adam) dense and
sparse, and the encoder's product alone, which no exact step can do without. The absolute times are this machine's; the
ratios carry over. The ceiling is what the machine reaches on the encoder's product; a dense step is five such products
(10 x batch x width x features operations), and its share of the ceiling says what everything else costs.
"""

import argparse
import os
import sys
import time

import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from sae import RECIPES, SAEConfig, SparseAutoencoder  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d_in", type=int, default=512)
    parser.add_argument("--n_features", type=int, default=4096)
    parser.add_argument("--batch_size", type=int, default=4096)
    parser.add_argument("--l0", type=float, default=25)
    parser.add_argument("--recipe", default="scaling", choices=RECIPES)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    torch.manual_seed(0)
    on_gpu = args.device != "cpu"
    torch.set_float32_matmul_precision("high")
    autocast = torch.autocast(torch.device(args.device).type, dtype=torch.bfloat16, enabled=on_gpu)
    sae = SparseAutoencoder(SAEConfig(args.d_in, args.n_features, args.recipe)).to(args.device)
    loss_of = torch.compile(sae.loss) if on_gpu else sae.loss
    x = torch.randn(args.batch_size, args.d_in, device=args.device)
    with torch.no_grad():  # a bias that leaves about l0 features active
        pre = (x[:512] @ sae.W_enc).flatten()
        sae.b_enc -= pre.kthvalue(round(len(pre) * (1 - args.l0 / args.n_features))).values
    optimizer = torch.optim.Adam(sae.parameters(), lr=0.0, fused=True)

    def step(sparse):
        with autocast:
            loss, stats = loss_of(x, 1.0, sparse=sparse)
        optimizer.zero_grad()
        loss.backward()
        sae.remove_parallel_gradient()
        if sae.recipe.clip:
            torch.nn.utils.clip_grad_norm_(sae.parameters(), sae.recipe.clip)
        optimizer.step()
        sae.normalize_decoder()
        return stats["l0"]

    def gradients(sparse):
        step(sparse)
        return [p.grad.clone() for p in sae.parameters()]

    l0, dense = step(False).item(), gradients(False)
    W_enc = sae.W_enc.detach().to(torch.bfloat16 if on_gpu else torch.float32)
    x_in, out = x.to(W_enc), torch.empty(args.batch_size, args.n_features, device=args.device, dtype=W_enc.dtype)
    runs = {"dense step": lambda: step(False), "encoder product": lambda: torch.mm(x_in, W_enc, out=out)}
    note = ""
    if not on_gpu:
        runs["sparse step"] = lambda: step(True)
        worst = max(((a - b).norm() / b.norm()).item() for a, b in zip(gradients(True), dense))
        note = f"; gradients differ by {worst:.1e} (relative)"
    repeats = 100 if on_gpu else 1  # a GPU works on what was asked for while more is asked for
    times = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, fn in runs.items():
            start = time.perf_counter()
            for _ in range(repeats):
                fn()
            if on_gpu:
                torch.cuda.synchronize()
            times[name].append((time.perf_counter() - start) / repeats)
    medians = {name: float(np.median(t)) for name, t in times.items()}
    print(
        f"{args.recipe}, {args.d_in} -> {args.n_features:,}, batch {args.batch_size:,}, L0 {l0:.1f}, "
        f"{torch.cuda.get_device_name() if on_gpu else f'{torch.get_num_threads()} threads'}, "
        f"torch {torch.__version__}{note}"
    )
    ceiling = 2 * args.batch_size * args.d_in * args.n_features / medians["encoder product"]
    share = 10 * args.batch_size * args.d_in * args.n_features / medians["dense step"] / ceiling
    print(
        f"  {args.batch_size / min(medians[name] for name in medians if 'step' in name):,.0f} activations/s; ceiling "
        f"{ceiling / 1e12:.3g} TFLOP/s, of which the dense step reaches {share:.0%}"
    )
    for name, t in medians.items():
        print(
            f"  {name:<16}{t * 1e3:9.1f} ms   {medians['dense step'] / t:5.2f} x the dense step's speed   "
            f"{t / medians['encoder product']:5.2f} x the encoder product's time"
        )


if __name__ == "__main__":
    main()
