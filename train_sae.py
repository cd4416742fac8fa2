"""
GPT -> activations in .npy -> a sparse autoencoder.

    python train_sae.py                                           # Scaling Monosemanticity's recipe, MLP activations
    python train_sae.py --recipe=towards --name=t4096 --n_features=4096
    python train_sae.py --site=resid --l1_coeff=2
    python train_sae.py --acts='my/*.npy' --n_features=8192       # your own activations: no GPT needed
    python train_sae.py --acts=toy --n_features=512 --l1_coeff=3  # made from known directions: does it find them?

Reads out_dir/gpt.pt and train.bin. Writes out_dir/acts/<site>.<layer>/*.npy (float16 rows, shuffled; reused while they
match) and out_dir/sae/<name>/: sae.pt, log.jsonl.
"""
import glob
import json
import math
import os
import shutil

import numpy as np
import torch

from model import (Progress, UserError, load_gpt, load_json, load_tokens, make_parser, not_negative, positive, run,
                   save_json, setup, write_atomic)
from sae import (RECIPES, ActivationStore, SparseAutoencoder, l1_at, lr_at, resample_schedule, save_sae)

SHARD_ROWS = 2**17  # rows of one .npy file; one of them is all that a dump ever holds in memory


def parse_args():
    parser = make_parser(__doc__)
    group = parser.add_argument_group("activations")
    group.add_argument("--site", default="mlp", choices=["mlp", "resid", "attn"],
                       help="mlp: MLP activations after the ReLU; resid: residual stream after the block; "
                       "attn: attention output")
    group.add_argument("--layer", type=int, default=0, help="which block, counted from 0")
    group.add_argument("--n_acts", type=positive, default=2_000_000, help="training vectors to keep on disk")
    group.add_argument("--acts", default="gpt",
                       help="gpt: dump them from out_dir/gpt.pt; toy: made from known directions; or a pattern of your "
                       "own .npy files, quoted (their last twentieth is held out)")
    group.add_argument("--input_norm", default="dataset", choices=["dataset", "token", "none"],
                       help="what brings ||x||^2 to the width: one scalar for all, each vector's own norm, nothing")
    group = parser.add_argument_group("autoencoder")
    group.add_argument("--recipe", default="scaling", help=f"one of {', '.join(RECIPES)}")
    group.add_argument("--name", default="auto", help="folder under out_dir/sae; auto: the recipe")
    group.add_argument("--n_features", type=positive, default=2048, help="dictionary size")
    group.add_argument("--decoder_norm", type=not_negative, default=0.3,
                       help="scaling: norm of the decoder rows at the start")
    group.add_argument("--l1_coeff", type=not_negative, default=5.0, help="lambda, weight of the sparsity penalty")
    group = parser.add_argument_group("training")
    group.add_argument("--batch_size", type=positive, default=2048, help="activation vectors a step")
    group.add_argument("--max_iters", type=positive, default=1500, help="steps")
    group.add_argument("--learning_rate", type=not_negative, default=1e-3, help="of Adam")
    group.add_argument("--resample", default="auto",
                       help="steps after which dead features are resampled, with commas; none; auto: for towards "
                       "25,000, 50,000, 75,000, 100,000 (earlier in runs of fewer than 200,000 steps), else none")
    group.add_argument("--dead_steps", default="auto",
                       help="a feature is dead when it was silent for so many steps; auto: 12,500 (fewer in runs of "
                       "fewer than 200,000 steps)")
    group.add_argument("--log_interval", type=positive, default=50, help="steps between lines of log.jsonl")
    group.add_argument("--save_interval", type=positive, default=500, help="steps between checkpoints")
    return parser.parse_args()


# -----------------------------------------------------------------------------
# activations

@torch.no_grad()
def gpt_rows(gpt, tokens, site, rng, device):
    """
    Endless generator of activations (rows, width): 250 of every 256 tokens of random contexts, picked at random
    (Towards Monosemanticity, appendix on the data set). rng: numpy Generator, decides contexts and tokens.
    """
    T, n_contexts = gpt.config.block_size, max(1, 8192 // gpt.config.block_size)
    kept = {}

    def hook(name, x):
        if name == site:
            kept["x"] = x
    while True:
        starts = rng.integers(0, len(tokens) - T + 1, n_contexts)
        idx = torch.from_numpy(np.stack([tokens[s:s + T] for s in starts]).astype(np.int64))  # (n_contexts, T)
        gpt.trunk(idx.to(device), hook)
        pick = rng.permuted(np.tile(np.arange(T), (n_contexts, 1)), axis=1)[:, :math.ceil(T * 250 / 256)]
        yield kept["x"][np.arange(n_contexts)[:, None], pick].flatten(0, 1)


def toy_rows(directions, rng, n_active=3.0):
    """
    Endless generator of toy activations with known truth (rows, width): feature i is on with a probability that falls
    by e^2 from the first to the last, n_active of them on average, each with a strength uniform in (0, 1).
    """
    odds = np.exp(-2 * np.arange(len(directions)) / (len(directions) - 1))
    odds *= n_active / odds.sum()
    while True:
        on = rng.random((8192, len(directions)), dtype=np.float32) < odds
        yield torch.from_numpy((on * rng.random(on.shape, dtype=np.float32)) @ directions)


def write_shards(folder, split, rows_of, n_rows, width, rng):
    """n_rows rows of a generator -> folder/<split>-NNN.npy, float16, shuffled; one shard is in memory at a time."""
    progress = Progress(f"writing {folder}/{split}", n_rows, "rows")
    left, done = torch.empty(0, width), 0
    for number in range(math.ceil(n_rows / SHARD_ROWS)):
        shard = np.empty((min(SHARD_ROWS, n_rows - done), width), dtype=np.float16)
        places = rng.permutation(len(shard))  # where the next rows go: shuffles the shard as it fills
        filled = 0
        while filled < len(shard):
            rows = left if len(left) else next(rows_of)
            rows, left = rows[:len(shard) - filled], rows[len(shard) - filled:]
            half = rows.half().cpu().numpy()
            if not np.isfinite(half).all():
                site = os.path.basename(folder)
                raise UserError(f"activations of {site} are NaN or beyond float16 (65,504): train another model")
            shard[places[filled:filled + len(half)]] = half
            filled += len(half)
            if progress.due():
                progress.show(done + filled)
        write_atomic(os.path.join(folder, f"{split}-{number:03d}.npy"), lambda f: np.save(f, shard))
        done += len(shard)


def dump(folder, meta, train_rows, val_rows, n_acts, seed):
    """
    Fills folder with train-NNN.npy, val-NNN.npy and, once they are complete, meta.json. A folder whose meta.json says
    the same is left as it is. meta: what the rows depend on, a dict with "width" among others.
    """
    n_val = max(1024, min(SHARD_ROWS, n_acts // 20))
    meta = meta | {"rows": n_acts, "val_rows": n_val, "seed": seed}
    path = os.path.join(folder, "meta.json")
    if os.path.exists(path) and load_json(path, f"delete {folder}") == meta:
        print(f"activations: {folder} is there, {n_acts:,} rows")
        return
    os.makedirs(folder, exist_ok=True)
    old = glob.glob(os.path.join(glob.escape(folder), "*.npy"))
    need = (n_acts + n_val) * meta["width"] * 2
    free = shutil.disk_usage(folder).free + sum(map(os.path.getsize, old))
    print(f"activations: {n_acts + n_val:,} rows of {meta['width']} need {need / 1e9:.2f} GB in {folder}, "
          f"{free / 1e9:.1f} GB are free")
    if need > free:
        raise UserError(f"{folder} needs {need / 1e9:.2f} GB and {free / 1e9:.2f} GB are free: lower --n_acts")
    for name in old + [path] * os.path.exists(path):
        os.remove(name)
    for split, rows_of, n in (("val", val_rows, n_val), ("train", train_rows, n_acts)):
        write_shards(folder, split, rows_of, n, meta["width"], np.random.default_rng((seed, split == "val")))
    save_json(path, meta)


def prepare(args, device):
    """--acts -> ActivationStore of training rows, of held-out rows, dict that tells analyze.py where they come from."""
    rngs = np.random.default_rng((args.seed, 2)), np.random.default_rng((args.seed, 3))
    site = f"{args.site}.{args.layer}"
    if args.acts == "gpt":
        gpt, _ = load_gpt(args.out_dir, device)
        width, fingerprint = gpt.site_width(site), gpt.fingerprint()
        folder = os.path.join(args.out_dir, "acts", site)
        rows = [gpt_rows(gpt, load_tokens(args.out_dir, split), site, rng, device)
                for split, rng in zip(("train", "val"), rngs)]
        meta = {"site": args.site, "layer": args.layer, "width": width, "gpt": fingerprint}
        dump(folder, meta, *rows, args.n_acts, args.seed)
        source = {"site": site, "gpt": fingerprint}
    elif args.acts == "toy":
        folder = os.path.join(args.out_dir, "acts", "toy")
        truth = np.random.default_rng((args.seed, 4)).standard_normal((256, 64), dtype=np.float32)
        truth /= np.linalg.norm(truth, axis=1, keepdims=True)
        dump(folder, {"site": "toy", "width": 64}, *(toy_rows(truth, rng) for rng in rngs), args.n_acts, args.seed)
        source = {"site": "toy", "truth": torch.from_numpy(truth)}
    else:
        paths = sorted(glob.glob(args.acts, recursive=True))
        if not paths:
            raise UserError(f"no file matches --acts={args.acts}: it takes gpt, toy or a quoted pattern of .npy files")
        return (ActivationStore(paths, args.seed, (0, 0.95)), ActivationStore(paths, args.seed, (0.95, 1)),
                {"site": "own", "acts": [os.path.abspath(path) for path in paths]})
    paths = [sorted(glob.glob(os.path.join(glob.escape(folder), f"{split}-*.npy"))) for split in ("train", "val")]
    return *(ActivationStore(p, args.seed) for p in paths), source


# -----------------------------------------------------------------------------
# training

def step_list(text, flag):
    """'100,200' -> [100, 200]"""
    try:
        return [positive(part) for part in text.split(",")]
    except Exception:
        raise UserError(f"{flag} takes auto, none or whole numbers with commas between, not {text}")


@torch.no_grad()
def held_out(sae, store, n_rows=65536):
    """-> variance explained (about the mean) and L0 on up to n_rows held-out rows."""
    rows = min(n_rows, store.rows)
    error, active, total, squares = 0.0, 0, torch.zeros(store.width, dtype=torch.float64), 0.0
    for start in range(0, rows, 4096):
        x = store.batch(start, min(4096, rows - start)).to(sae.W_dec)
        f = sae.encode(x)
        error += (sae.decode(f, sae.input_scale(x)) - x).square().sum().item()
        active += (f > 0).sum().item()
        total += x.sum(0).double().cpu()
        squares += x.double().square().sum().item()
    return 1 - error / (squares - total.square().sum().item() / rows), active / rows


def main():
    args = parse_args()
    if args.recipe not in RECIPES:
        raise UserError(f"unknown --recipe={args.recipe}: it is one of {', '.join(RECIPES)}")
    device, autocast, compiled = setup(args)
    store, val_store, source = prepare(args, device)
    if store.rows < args.batch_size:
        raise UserError(f"--batch_size={args.batch_size} is more than the {store.rows:,} rows there are")
    out = os.path.join(args.out_dir, "sae", args.recipe if args.name == "auto" else args.name)
    os.makedirs(out, exist_ok=True)

    resample_steps, dead_steps = resample_schedule(args.max_iters)
    if args.resample != "auto" or args.recipe != "towards":
        resample_steps = [] if args.resample in ("auto", "none") else step_list(args.resample, "--resample")
    if args.dead_steps != "auto":
        dead_steps = step_list(args.dead_steps, "--dead_steps")[0]

    sae = SparseAutoencoder(store.width, args.n_features, args.recipe, args.input_norm, args.decoder_norm).to(device)
    sae.fit_to(store.sample(32768, (args.seed, 5)).to(device))
    optimizer = torch.optim.Adam(sae.parameters(), betas=(0.9, 0.999), fused=device.type != "mps")
    loss_of = torch.compile(sae.loss) if compiled else sae.loss
    last_fired = torch.zeros(args.n_features, dtype=torch.long, device=device)  # in which step
    print(f"sae: {args.recipe}, {store.width} -> {args.n_features:,} features, "
          f"{args.max_iters * args.batch_size / store.rows:.2f} epochs of {store.rows:,} rows, "
          f"inputs x {sae.scale.item():.4g}, on {device}")

    log = []
    progress = Progress("training", args.max_iters, "steps")
    for step in range(args.max_iters):
        x = store.batch(step * args.batch_size, args.batch_size).to(device)
        l1_coeff = l1_at(step, args.max_iters, args.l1_coeff, args.recipe)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, args.max_iters, args.learning_rate, args.recipe)
        with autocast:
            loss, stats = loss_of(x, l1_coeff)
        optimizer.zero_grad()
        loss.backward()
        sae.remove_parallel_gradient()                                  # towards only
        if args.recipe == "scaling":
            torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        sae.normalize_decoder()                                         # towards and tied only

        done = step + 1
        last_fired[stats["fired"]] = done
        dead = done - last_fired >= dead_steps
        if done in resample_steps:
            sample = store.sample(100 * args.batch_size, (args.seed, 6, step)).to(device)  # the paper's 819,200
            n = sae.resample(dead, sample, optimizer, l1_coeff, torch.Generator().manual_seed(args.seed + done))
            last_fired[dead] = done
            print(f"step {done:,}: resampled {n:,} dead features")
        if done % args.log_interval == 0 or done == args.max_iters:
            scaled = x * sae.input_scale(x)
            log.append({"step": done, "rows": done * args.batch_size, "loss": loss.item(), "mse": stats["mse"].item(),
                        "l1": stats["l1"].item(), "l0": stats["l0"].item(), "dead": dead.float().mean().item(),
                        "variance_explained": 1 - stats["mse"].item() / scaled.var(0, correction=0).sum().item(),
                        "l1_coeff": l1_coeff, "learning_rate": optimizer.param_groups[0]["lr"]})
            if not math.isfinite(log[-1]["loss"]):
                raise UserError(f"the loss is {log[-1]['loss']} at step {done}: try a lower --learning_rate")
        if (progress.due() or done == args.max_iters) and log:
            row = log[-1]
            progress.show(done, f"loss {row['loss']:.2f}  L0 {row['l0']:.1f}  variance explained "
                          f"{row['variance_explained']:.3f}  dead {row['dead']:.1%}")
        if done % args.save_interval == 0 or done == args.max_iters:
            save_sae(os.path.join(out, "sae.pt"), sae, source=source, optimizer=optimizer.state_dict(), step=done,
                     last_fired=last_fired, args=vars(args))

    with open(os.path.join(out, "log.jsonl"), "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in log)
    variance_explained, l0 = held_out(sae, val_store)
    print(f"held-out rows: variance explained {variance_explained:.3f} at L0 {l0:.1f}")
    print(f"wrote {os.path.join(out, 'sae.pt')}; next: python analyze.py --name={os.path.basename(out)}")


if __name__ == "__main__":
    run(main)
