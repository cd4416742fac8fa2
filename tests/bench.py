"""
How fast is a training step? By hand, on a quiet machine:

    python tests/bench.py                                # the default run's sizes
    python tests/bench.py --n_features=4096 --batch_size=4096 --l0=25
    python tests/bench.py --n_features=16384 --recipe=towards
    python tests/bench.py --device=cuda --recipe=towards --n_features=4096 --batch_size=8192 \
        --vocab_size=50257 --block_size=256 --contexts=64

One process, all in turn, medians. The absolute times are this machine's, the ratios carry over.

- The autoencoder: a whole step of train_sae.py with its statistics, clip or projection and Adam,
  dense and (on a CPU) sparse; making the rows of one step, as --stream does; and the encoder's
  product alone, which no exact step can do without: as the scripts compute it and, where that is
  oneDNN's, by MKL, as torch would. What a line of the log, a checkpoint, the resampling and the
  judgement at the end take is left out.
- The language model: a whole step of train_gpt.py, and its matrix products alone. Measuring the
  loss, checkpoints and cutting contexts out of the text are left out.

On CUDA products are in bfloat16 and the steps compiled, as the scripts have it.
"""
import argparse
import os
import sys
import time

import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from model import GPT, GPTConfig, keep_freed_memory, use_faster_products  # noqa: E402
from sae import RECIPES, SHARD_ROWS, SAEConfig, SparseAutoencoder  # noqa: E402
from train_gpt import make_optimizer  # noqa: E402
from train_sae import gpt_rows  # noqa: E402


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--d_in", type=int, default=512, help="width of the MLP, four times the model's")
    add("--n_features", type=int, default=2048)
    add("--batch_size", type=int, default=2048, help="rows a step of the autoencoder")
    add("--l0", type=float, default=11, help="active features a row")
    add("--recipe", default="scaling", choices=RECIPES)
    add("--vocab_size", type=int, default=2048)
    add("--block_size", type=int, default=128, help="tokens a context")
    add("--contexts", type=int, default=32, help="contexts a step of the language model")
    add("--rounds", type=int, default=15)
    add("--device", default="cpu")
    return parser.parse_args()


def medians(functions, rounds, on_gpu):
    """{name: function} -> {name: seconds of one call}, all called in turn."""
    repeats = 20 if on_gpu else 1  # a GPU works on what was asked for while more is asked for
    times = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            for _ in range(repeats):
                function()
            if on_gpu:
                torch.cuda.synchronize()
            times[name].append((time.perf_counter() - start) / repeats)
    # without the first round, in which torch.compile compiles
    return {name: float(np.median(seconds[1:])) for name, seconds in times.items()}


def sae_functions(args, autocast, on_gpu):
    """What is timed of the autoencoder, {name: function}, and how far the gradients differ."""
    sae = SparseAutoencoder(SAEConfig(args.d_in, args.n_features, args.recipe)).to(args.device)
    x = torch.randn(args.batch_size, args.d_in, device=args.device)
    with torch.no_grad():  # a bias that leaves about l0 features active
        z = (x[:512] @ sae.W_enc).flatten()
        share = 1 - args.l0 / args.n_features
        sae.b_enc -= z.kthvalue(round(len(z) * share)).values
    optimizer = torch.optim.Adam(sae.parameters(), lr=0.0, fused=True)
    loss_of = torch.compile(sae.loss) if on_gpu else sae.loss
    last_fired = torch.zeros(args.n_features, dtype=torch.long, device=args.device)
    l1_coeff = torch.full((), 1.0, device=args.device)

    def step(sparse):
        with autocast:
            loss, stats = loss_of(x, l1_coeff, sparse=sparse)
        optimizer.zero_grad()
        loss.backward()
        sae.remove_parallel_gradient()
        if sae.recipe.clip:
            torch.nn.utils.clip_grad_norm_(sae.parameters(), sae.recipe.clip)
        optimizer.step()
        sae.normalize_decoder()
        last_fired.masked_fill_(stats["fired"], 1)

    def gradients(sparse):
        step(sparse)
        return [p.grad.clone() for p in sae.parameters()]

    W_enc = sae.W_enc.detach().to(torch.bfloat16 if on_gpu else torch.float32)
    rows = x.to(W_enc.dtype)
    product = torch.empty(args.batch_size, args.n_features, device=args.device, dtype=W_enc.dtype)
    functions = {
        "encoder product": lambda: torch.mm(rows, W_enc, out=product),
        "dense step": lambda: step(False),
    }
    if torch.get_float32_matmul_precision() == "medium":  # see use_faster_products
        def by_mkl():
            torch.set_float32_matmul_precision("highest")
            torch.mm(rows, W_enc, out=product)
            torch.set_float32_matmul_precision("medium")
        functions["the same by MKL"] = by_mkl
    worst = 0.0
    if not on_gpu:
        functions["sparse step"] = lambda: step(True)
        for sparse, dense in zip(gradients(True), gradients(False)):
            worst = max(worst, ((sparse - dense).norm() / dense.norm()).item())
    return functions, worst


def gpt_functions(args, gpt, autocast, on_gpu):
    """What is timed of the language model: {name: function}."""
    optimizer = make_optimizer(gpt, 0.0)
    model = torch.compile(gpt) if on_gpu else gpt
    shape = (args.contexts, args.block_size + 1)
    tokens = torch.randint(args.vocab_size, shape, device=args.device)

    def step():
        with autocast:
            _, loss = model(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        optimizer.step()

    dtype = torch.bfloat16 if on_gpu else torch.float32
    N = args.contexts * args.block_size
    operands = []
    for name, p in gpt.named_parameters():
        if p.dim() == 2 and "wte" not in name and "wpe" not in name:
            W = p.detach().to(dtype)
            x = torch.randn(N, W.shape[1], device=args.device, dtype=dtype)
            y = torch.randn(N, W.shape[0], device=args.device, dtype=dtype)
            operands.append((W, x, y, torch.empty_like(W), torch.empty_like(x)))

    def products():
        for W, x, y, of_W, of_x in operands:
            torch.mm(x, W.t(), out=y)
            torch.mm(y, W, out=of_x)
            torch.mm(y.t(), x, out=of_W)

    return {"its products": products, "language model": step}


def report_sae(args, times, seconds_of_rows):
    """Prints the autoencoder's times, beside the encoder's product."""
    of_product = times["encoder product"]
    steps = {name: seconds for name, seconds in times.items() if name.endswith("step")}
    for name, seconds in steps.items():
        print(f"  {name:<18}{seconds * 1e3:9.2f} ms   "
              f"{seconds / of_product:5.2f} x the encoder product's time")
    for name in ("encoder product", "the same by MKL"):
        if name in times:
            print(f"  {name:<18}{times[name] * 1e3:9.2f} ms")
    print(f"  {'making its rows':<18}{seconds_of_rows * 1e3:9.2f} ms")
    fastest = min(steps.values())
    operations = 2 * args.batch_size * args.d_in * args.n_features
    # five such products: encoder and decoder, and the gradients of both and of f
    reached = 5 * of_product / steps["dense step"]
    print(
        f"  {args.batch_size / fastest:,.0f} activations/s from disk, "
        f"{args.batch_size / (fastest + seconds_of_rows):,.0f} streamed; "
        f"products reach {operations / of_product / 1e12:.3g} TFLOP/s, "
        f"the dense step {reached:.0%} of it"
    )


def main():
    args = parse_args()
    keep_freed_memory()  # as the scripts do
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    on_gpu = args.device != "cpu"
    if not on_gpu:
        use_faster_products()
    device_type = torch.device(args.device).type
    autocast = torch.autocast(device_type, dtype=torch.bfloat16, enabled=on_gpu)
    machine = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} threads"
    print(f"{machine}, torch {torch.__version__}")

    config = GPTConfig(args.block_size, args.vocab_size, n_embd=args.d_in // 4)
    gpt = GPT(config).to(args.device)
    functions, worst = sae_functions(args, autocast, on_gpu)
    times = medians(functions, args.rounds, on_gpu)
    # the rows of a step: its share of a shard's
    text = np.random.default_rng(0).integers(0, args.vocab_size, 2**22).astype(np.uint16)
    make = {"shard": lambda: gpt_rows(gpt, text, "mlp.0", 0, SHARD_ROWS)}
    shard = medians(make, max(1, args.rounds // 5), on_gpu)["shard"]
    note = "" if on_gpu else f"; sparse and dense gradients differ by {worst:.1e} (relative)"
    print(
        f"\n{args.recipe}, {args.d_in} -> {args.n_features:,}, batch {args.batch_size:,}, "
        f"L0 {args.l0:g}{note}"
    )
    report_sae(args, times, shard * args.batch_size / SHARD_ROWS)

    times = medians(gpt_functions(args, gpt, autocast, on_gpu), args.rounds, on_gpu)
    step = times["language model"]
    print(
        f"\nlanguage model, {args.contexts} contexts of {args.block_size}, "
        f"width {config.n_embd}, vocabulary {args.vocab_size:,}\n"
        f"  {'step':<18}{step * 1e3:9.2f} ms   "
        f"{step / times['its products']:5.2f} x its products' time\n"
        f"  {args.contexts * args.block_size / step:,.0f} tokens/s"
    )


if __name__ == "__main__":
    main()
