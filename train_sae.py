"""
GPT -> activations in .npy -> a sparse autoencoder.

    python train_sae.py                                           # Scaling Monosemanticity's recipe, MLP activations
    python train_sae.py --recipe=towards --name=t4096 --n_features=4096
    python train_sae.py --site=resid --l1_coeff=2 --name=resid
    python train_sae.py --acts='my/*.npy' --name=mine             # your own activations: no GPT needed
    python train_sae.py --acts=toy --n_features=512 --name=toy    # made from known directions: does it find them?
    python train_sae.py --stream --max_iters=100000 --name=long   # activations made as they are needed, none on disk
    python train_sae.py --resume                                  # go on after a kill or Ctrl-C
    torchrun --nproc_per_node=2 train_sae.py --batch_size=1024    # on two GPUs or two CPUs, 1,024 rows each

Reads what train_gpt.py left in out_dir. Writes out_dir/acts/<site>.<layer>/*.npy (float16 rows, shuffled; reused while
they match) and out_dir/sae/<name>/: sae.pt, log.jsonl.
"""
import glob
import math
import os
import re
import shutil
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from model import (ANEW, Progress, UserError, at_least, check_finite, load_gpt, load_json, load_tokens, make_parser,
                   rank_0_first, reading, resumable, run, save_json, save_jsonl, setup, steps, tracked, write_atomic)
from sae import (RECIPES, SHARD_ROWS, ActivationStore, ActivationStream, SparseAutoencoder, l1_at, lr_at,
                 resample_schedule, save_sae)


def step_list(text):
    """argparse type: auto, or none, or whole numbers with commas between: '100,200' -> [100, 200]."""
    return text if text == "auto" else [] if text == "none" else [at_least(1)(part) for part in text.split(",")]


def parse_args():
    parser = make_parser(__doc__)
    group = parser.add_argument_group("activations")
    group.add_argument("--site", default="mlp", choices=["mlp", "resid", "attn"],
                       help="mlp: MLP activations after the ReLU; resid: residual stream after the block; "
                       "attn: attention output")
    group.add_argument("--layer", type=int, default=0, help="which block, counted from 0")
    group.add_argument("--n_acts", type=at_least(1), default=2_000_000, help="training vectors to keep on disk")
    group.add_argument("--acts", default="gpt",
                       help="gpt: dump them from out_dir/gpt.pt; toy: made from known directions; or a pattern of your "
                       "own .npy files, quoted (their last twentieth is held out)")
    group.add_argument("--stream", action="store_true", help="make them when they are needed, write none to disk")
    group.add_argument("--input_norm", default="dataset", choices=["dataset", "token", "none"],
                       help="what brings ||x||^2 to the width: one scalar for all, each vector's own norm, nothing")
    group = parser.add_argument_group("autoencoder")
    group.add_argument("--recipe", default="scaling", choices=RECIPES, help="which paper's: see sae.py")
    group.add_argument("--name", default="auto", help="folder under out_dir/sae; auto: the recipe")
    group.add_argument("--n_features", type=at_least(1), default=2048, help="dictionary size")
    group.add_argument("--decoder_norm", type=at_least(1e-6, float), default=0.3,
                       help="scaling: norm of the decoder rows at the start")
    group.add_argument("--pre_bias", default="auto", choices=["auto", "yes", "no"],
                       help="subtract b_dec from the activations before they are encoded; auto: in towards alone; "
                       "tied has no b_dec")
    group.add_argument("--l1_coeff", type=at_least(0, float), default=5.0, help="lambda, weight of the sparsity")
    group = parser.add_argument_group("training")
    group.add_argument("--batch_size", type=at_least(1), default=2048, help="activation vectors a step, of each rank")
    group.add_argument("--max_iters", type=at_least(1), default=1500, help="steps")
    group.add_argument("--learning_rate", type=at_least(0, float), default=1e-3, help="of Adam")
    group.add_argument("--resample", type=step_list, default="auto",
                       help="steps after which dead features are resampled, with commas; none; auto: for towards "
                       "25,000, 50,000, 75,000, 100,000 (earlier in runs of fewer than 200,000 steps), else none")
    group.add_argument("--dead_steps", type=at_least(1), help="a feature is dead when it was silent for so many steps; "
                       "None: 12,500 (fewer in runs of fewer than 200,000 steps)")
    group.add_argument("--log_interval", type=at_least(1), default=50, help="steps between lines of log.jsonl")
    group.add_argument("--save_interval", type=at_least(1), default=500, help="steps between checkpoints")
    group.add_argument("--resume", action="store_true", help="go on from the last checkpoint, if there is one")
    return parser.parse_args()


# -----------------------------------------------------------------------------
# activations

@torch.no_grad()
def gpt_rows(gpt, tokens, site, n, key):
    """
    n activations at a site (n, width) float16 in random order: 250 of every 256 tokens of random contexts, picked at
    random (Towards Monosemanticity, appendix on the data set). key (integers) decides contexts, tokens and order.
    """
    T, device, rng = gpt.config.block_size, gpt.wte.weight.device, np.random.default_rng(key)
    n_contexts = max(1, (8192 if device.type == "cpu" else 34_000) // T)     # a GPU wants more at once
    n_kept = math.ceil(T * 250 / 256)
    rows = torch.empty(n, gpt.site_width(site), dtype=torch.float16, device=device)
    places = torch.from_numpy(rng.permutation(n)).to(device)
    for start in range(0, n, n_contexts * n_kept):
        starts = rng.integers(0, len(tokens) - T + 1, (n_contexts, 1))
        idx = torch.from_numpy(tokens[starts + np.arange(T)].astype(np.int64))       # (n_contexts, T)
        pick = rng.permuted(np.arange(n_contexts * T).reshape(-1, T), axis=1)[:, :n_kept].ravel()[:n - start]
        x = gpt.activations(idx.to(device), site).flatten(0, 1)[torch.from_numpy(pick).to(device)]
        rows[places[start:start + len(x)]] = x.half()
    if not rows.isfinite().all():
        raise UserError(f"activations of {site} are NaN or beyond float16 (65,504): train another model")
    return rows


def toy_rows(directions, n, key, n_active=3.0):
    """
    n toy activations with known truth (n, width) float16: direction i is on with a probability that falls by e^2 from
    the first to the last, n_active of them on average, each with a strength uniform in (0, 1).
    """
    rng, odds = np.random.default_rng(key), np.exp(-2 * np.arange(len(directions)) / (len(directions) - 1))
    on = rng.random((n, len(directions)), dtype=np.float32) < odds * n_active / odds.sum()
    return torch.from_numpy((on * rng.random(on.shape, dtype=np.float32)) @ directions).half()


def dump(folder, meta, make, n_acts):
    """
    Fills folder with train-NNN.npy and val-NNN.npy, shards of make(split, n, key), and leaves those that are there and
    go with meta (what the rows depend on, with "width" and "seed"; in meta.json) as they are.
    -> paths of the training and of the held-out shards
    """
    n_val = max(1024, min(SHARD_ROWS, n_acts // 20))
    meta, path = meta | {"rows": n_acts, "val_rows": n_val}, os.path.join(folder, "meta.json")
    shards = {os.path.join(folder, f"{split}-{start // SHARD_ROWS:03d}.npy"): (split, min(SHARD_ROWS, n - start), start)
              for split, n in (("train", n_acts), ("val", n_val)) for start in range(0, n, SHARD_ROWS)}
    found = load_json(path, f"delete {folder}") if os.path.exists(path) else {}
    os.makedirs(folder, exist_ok=True)
    present = glob.glob(os.path.join(glob.escape(folder), "*.npy"))
    old = present if found != meta else []
    missing = {name: shard for name, shard in shards.items() if name not in present or name in old}
    need = sum(n for _, n, _ in missing.values()) * meta["width"] * 2
    free = shutil.disk_usage(folder).free + sum(map(os.path.getsize, old))
    print(f"activations: {n_acts + n_val:,} rows of {meta['width']} in {folder}; {len(shards) - len(missing)} of "
          f"{len(shards)} files are there, the others need {need / 1e9:.2f} of {free / 1e9:.1f} GB that are free")
    if need > free:
        raise UserError(f"{folder} needs {need / 1e9:.2f} GB and {free / 1e9:.2f} GB are free: lower --n_acts or use "
                        "--stream")
    if found != meta:  # in this order: a shard that is there goes with the meta.json that is
        for name in old:
            os.remove(name)
        save_json(path, meta)
    for name, (split, n, start) in tracked("writing activations", missing.items(), "rows", lambda shard: shard[1][1]):
        rows = make(split, n, (meta["seed"], start // SHARD_ROWS))
        write_atomic(name, lambda f: np.save(f, rows.cpu().numpy()))
    return [[name for name, shard in shards.items() if shard[0] == split] for split in ("train", "val")]


def prepare(args, device):
    """--acts -> store of training rows, of held-out rows, dict that tells analyze.py where they come from."""
    site, seed = f"{args.site}.{args.layer}", args.seed
    if args.acts == "gpt":
        gpt, _ = load_gpt(args.out_dir, device)
        source, width = {"site": site, "gpt": gpt.fingerprint()}, gpt.site_width(site)
        tokens = {split: load_tokens(args.out_dir, split, gpt.config) for split in ("train", "val")}

        def make(split, n, key):
            return gpt_rows(gpt, tokens[split], site, n, (split == "val", *key))
    elif args.acts == "toy":
        truth = np.random.default_rng((seed, 4)).standard_normal((256, 64), dtype=np.float32)
        truth /= np.linalg.norm(truth, axis=1, keepdims=True)
        source, width = {"site": "toy", "truth": torch.from_numpy(truth)}, 64

        def make(split, n, key):
            return toy_rows(truth, n, (split == "val", *key))
    else:
        paths = sorted(filter(os.path.isfile, glob.glob(args.acts, recursive=True)))
        if not paths:
            raise UserError(f"no file matches --acts={args.acts}: it takes gpt, toy or a quoted pattern of .npy files")
        source = {"site": "own", "acts": [os.path.abspath(path) for path in paths]}
        return ActivationStore(paths, seed, (0, 0.95)), ActivationStore(paths, seed, (0.95, 1)), source
    if args.stream:
        return *(ActivationStream(partial(make, split), width, seed) for split in ("train", "val")), source
    meta = {"site": args.site, "layer": args.layer, "gpt": source.get("gpt"), "width": width, "seed": seed}
    folder = os.path.join(args.out_dir, "acts", site if args.acts == "gpt" else "toy")
    return *(ActivationStore(paths, seed) for paths in dump(folder, meta, make, args.n_acts)), source


# -----------------------------------------------------------------------------
# training

def main():
    args = parse_args()
    name = args.recipe if args.name == "auto" else args.name
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(f"--name={name} is no name for a folder: use letters, digits, '.', '_' and '-'")
    device, autocast, compiled, rank, ranks = setup(args)
    args.batch_size *= ranks
    path = os.path.join(args.out_dir, "sae", name, "sae.pt")
    checkpoint = resumable(path, args, device)
    with rank_0_first(ranks):
        store, val_store, source = prepare(args, device)
    source["rows"] = store.rows
    if store.rows < args.batch_size:
        raise UserError(f"--batch_size={args.batch_size} is more than the {store.rows:,} rows there are")
    sample = store.sample(32768, (args.seed, 5)).to(device)
    if not 0 < sample.float().var(0).sum() < math.inf:
        raise UserError("the activations are all the same, or too large or too small for float32")

    resample_steps, dead_steps = resample_schedule(args.max_iters)
    if args.resample != "auto" or args.recipe != "towards":
        resample_steps = [] if args.resample == "auto" else args.resample
    dead_steps = args.dead_steps or dead_steps

    sae = SparseAutoencoder(store.width, args.n_features, args.recipe, args.input_norm, args.decoder_norm,
                            {"yes": True, "no": False}.get(args.pre_bias)).to(device)
    sae.fit_to(sample)
    optimizer = torch.optim.Adam(sae.parameters(), betas=(0.9, 0.999), fused=device.type != "mps")
    last_fired = torch.zeros(args.n_features, dtype=torch.long, device=device)  # in which step
    first, log = 0, []
    if checkpoint:
        if any(checkpoint["source"].get(key) != source[key] for key in source.keys() - {"truth"}):
            raise UserError(f"{path} was trained on other activations than there are now: run without --resume")
        with reading(path, ANEW):
            sae.load_state_dict(checkpoint["weights"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            sae.scale.fill_(checkpoint["scale"])
            first, log, last_fired = checkpoint["step"], checkpoint["log"], checkpoint["last_fired"]
    loss_of = torch.compile(sae) if compiled else sae
    if ranks > 1:
        loss_of = DistributedDataParallel(loss_of)
    there = f" of {store.rows:,}" if math.isfinite(store.rows) else ", made as they are needed"
    print(f"sae: {args.recipe}, {store.width} -> {args.n_features:,} features, scale {sae.scale.item():.4g}, "
          f"{args.max_iters * args.batch_size:,} rows{there}, on {device}")

    def save(step, loss):  # the checkpoint last: where it says that the run is finished, all is there
        check_finite(loss.item(), sae, step, optimizer, path)
        if rank:
            return
        os.makedirs(os.path.dirname(path), exist_ok=True)
        save_jsonl(os.path.join(os.path.dirname(path), "log.jsonl"), log)
        save_sae(path, sae, source=source, optimizer=optimizer.state_dict(), step=step, last_fired=last_fired,
                 log=log, args=vars(args))

    progress, done, share = Progress("training", args.max_iters, "steps", first), first, args.batch_size // ranks
    note = "loss {loss:.2f}  L0 {l0:.1f}  variance explained {variance_explained:.3f}  dead {dead:.1%}".format
    for step in steps(first, args.max_iters):
        x = store.batch(step * args.batch_size + rank * share, share).to(device)
        l1_coeff = l1_at(step, args.max_iters, args.l1_coeff, args.recipe)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, args.max_iters, args.learning_rate, args.recipe)
        with autocast:
            loss, stats = loss_of(x, torch.full((), l1_coeff, device=device))  # a GPU waits for torch.tensor
        optimizer.zero_grad()
        loss.backward()
        sae.remove_parallel_gradient()                                  # towards only
        if args.recipe == "scaling":
            torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        sae.normalize_decoder()                                         # towards and tied only

        done = step + 1
        fired = stats["fired"].byte()
        if ranks > 1:
            dist.all_reduce(fired, dist.ReduceOp.MAX)
        last_fired.masked_fill_(fired.bool(), done)
        dead = done - last_fired >= dead_steps
        if done in resample_steps:
            check_finite(loss.item(), sae, done, optimizer, path)
            inputs = store.sample(100 * args.batch_size, (args.seed, 6, step)).to(device)   # the paper's 819,200
            n = sae.resample(dead, inputs, optimizer, l1_coeff, torch.Generator().manual_seed(args.seed + done))
            if ranks > 1:
                for p in sae.parameters():  # the ranks may differ in the last bit, and so in what they drew
                    dist.broadcast(p.data if p.is_contiguous() else p.data.t(), 0)
            last_fired[dead] = done
            print(f"step {done:,}: resampled {n:,} dead features")
        if done % args.log_interval == 0 or done == args.max_iters:
            check_finite(loss.item(), sae, done, optimizer, path)
            variance = (x * sae.input_scale(x)).var(0, correction=0).sum().clamp_min(1e-9)
            log.append({"step": done, "rows": done * args.batch_size, "loss": loss.item(), "mse": stats["mse"].item(),
                        "l1": stats["l1"].item(), "l0": stats["l0"].item(), "dead": dead.float().mean().item(),
                        "variance_explained": 1 - (stats["mse"] / variance).item(),
                        "l1_coeff": l1_coeff, "learning_rate": optimizer.param_groups[0]["lr"]})
        if log:
            progress.show(done, lambda: note(**log[-1]), done == args.max_iters)
        if done % args.save_interval == 0 and done < args.max_iters:
            save(done, loss)
    save(done, loss)
    if done < args.max_iters:
        raise KeyboardInterrupt(f"step {done:,}")

    with torch.no_grad():
        x = val_store.batch(0, min(2048, val_store.rows)).to(device)
        l0, unexplained = (sae.encode(x) > 0).sum() / len(x), (sae(x) - x).square().sum()
    print(f"{len(x):,} held-out rows: variance explained {1 - unexplained / (x - x.mean(0)).square().sum():.3f} "
          f"at L0 {l0:.1f}")
    command = "analyze.py toy" if args.acts == "toy" else "analyze.py"
    print(f"wrote {path}; next: python {command} --name={name} --out_dir={args.out_dir}")


if __name__ == "__main__":
    run(main)
