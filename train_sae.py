"""
GPT -> activations in .npy -> a sparse autoencoder.

    python train_sae.py                                          # of MLP activations
    python train_sae.py --recipe=towards --name=t4096 --n_features=4096
    python train_sae.py --site=resid --l1_coeff=2 --name=resid
    python train_sae.py --acts='my/*.npy' --name=mine            # your own, without a GPT
    python train_sae.py --acts=toy --n_features=512 --name=toy   # does it find known directions?
    python train_sae.py --shuffle_weights --name=shuffled        # what of this is the model's?
    python train_sae.py --stream --max_iters=100000 --name=long  # no activations on disk
    python train_sae.py --resume                                 # go on after a kill or Ctrl-C
    torchrun --nproc_per_node=2 train_sae.py --batch_size=1024   # two GPUs or two CPUs

Reads what train_gpt.py left in out_dir. Writes out_dir/acts/<site>.<layer>/*.npy (float16 rows,
shuffled; runs of one model share them; those of the model with shuffled weights lie in a folder
<site>.<layer>-shuffled) and out_dir/sae/<name>/: sae.pt, log.jsonl.
"""
# A first reader: `train`, near the end, is the loop; `row_places` and `gpt_rows` are where its rows
# come from. "activations on disk" may be skipped.
import glob
import math
import os
import re
import shlex
import shutil
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.distributed as dist

from model import (ANEW, Progress, UserError, at_least, average_gradients, check_finite, interval,
                   load_gpt, load_json, load_tokens, lock_alone, lock_shared, make_parser,
                   rank_0_first, reading, resumable, run, same_on_all_ranks, save_json,
                   save_jsonl, setup, shuffled_weights, step_count, steps, to_device,
                   torchrun_ranks, tracked, write_atomic)
from sae import (HELD_OUT, MASSIVE, RECIPES, SHARD_ROWS, STARTS, TRAINED_ON, ActivationStore,
                 ActivationStream, SAEConfig, SparseAutoencoder, all_finite, explained_share,
                 l1_at, lr_at, massive_share, matching_files, mean_share, own_source,
                 paper_lambda, resample_schedule, restore_sae, save_sae, show_explained,
                 variance_of)

TOY_SEED = 4  # of the known directions, the same in every run

# Keys of this script's random draws begin with the seed and with what the draw is for.
FIRST_SAMPLE = 5
RESAMPLING = 6

RESAMPLING_ROWS = 819_200  # at most so many are looked at (Bricken et al., appendix)

# Whoever changes which rows are made raises this: activations on disk are then made anew.
ROWS_VERSION = 2
VAL_ROWS = 2**16  # held-out rows on disk, for a last look; analyze.py reads the text itself

# Where the mean holds more of the squared norm than this, --center is recommended: features that
# point against the mean never fire (arXiv 2605.31518). Of `scaling` on toy data moved away from 0,
# 1 % of the features died at a share of 0.2, 6 % at 0.5, 26 % at 0.8 and 89 % at 0.96, none with
# --center. Sites of train_gpt.py's models have shares of 0.06 to 0.33.
LARGE_MEAN = 0.5

# -----------------------------------------------------------------------------
# settings


def step_list(text):
    """argparse type: auto, none, or whole numbers with commas between: '100,200' -> [100, 200]."""
    if text == "auto":
        return text
    if text == "none":
        return []
    return [at_least(1)(part) for part in text.split(",")]


def parse_args():
    parser = make_parser(__doc__)
    papers = "; ".join(f"{name}: {recipe.paper}" for name, recipe in RECIPES.items())

    add = parser.add_argument_group("activations").add_argument
    add("--site", default="mlp", choices=["mlp", "resid", "attn"],
        help="mlp: MLP activations after the ReLU; resid: residual stream after the block; "
        "attn: attention output")
    add("--layer", type=int, default=0, help="which block, counted from 0")
    add("--n_acts", type=at_least(1), default=3_072_000,
        help=f"training vectors to keep on disk, in whole files of {SHARD_ROWS:,}; the default "
        "is as many as the default run trains on")
    add("--acts", type=os.path.expanduser, default="gpt",
        help="gpt: dump them from out_dir/gpt.pt; toy: made from known directions; or a "
        "pattern of your own .npy files, quoted (their last twentieth is held out)")
    add("--toy_offset", type=at_least(0, float), default=0.0,
        help="toy: norm of a vector that is added to all rows, which have about norm 1 without; "
        "a pre-encoder bias is for data like this")
    add("--shuffle_weights", action="store_true",
        help="a control: of the model with the entries of each weight matrix in random order, "
        "which has learned nothing")
    add("--stream", action="store_true",
        help="make them when they are needed, write none to disk")
    add("--input_norm", default="dataset", choices=["dataset", "token", "none"],
        help="what brings ||x||^2 to the width: one scalar, each vector's own norm, nothing")
    add("--center", action="store_true",
        help="take the mean of the activations off before that; for those with a large one, "
        "where most features would die (the papers do not)")

    add = parser.add_argument_group("autoencoder").add_argument
    add("--recipe", default=SAEConfig.recipe, choices=RECIPES, help=papers)
    add("--name", default="auto", help="folder under out_dir/sae; auto: the recipe")
    add("--n_features", type=at_least(1), default=2048, help="dictionary size")
    add("--decoder_norm", type=at_least(1e-6, float), default=SAEConfig.decoder_norm,
        help="norm of the decoder rows at the start, where the recipe leaves it free")
    add("--pre_bias", default="auto", choices=["auto", "yes", "no"],
        help="subtract b_dec from the activations before they are encoded; auto: as the "
        "recipe has it; not with tied weights, which have no b_dec")
    add("--start", default="auto", choices=["auto", *STARTS],
        help="transposed: W_enc is W_dec^T at first; kaiming: encoder and decoder start apart; "
        "auto: as the recipe has it")
    add("--l1_coeff", type=at_least(0, float), default=5.0,
        help="lambda, weight of the sparsity; in the units of Bricken et al., which are printed "
        "at the start, it is lambda / (width x scale)")

    add = parser.add_argument_group("training").add_argument
    add("--batch_size", type=at_least(1), default=2048,
        help="activation vectors a step, of each rank")
    add("--max_iters", type=at_least(1), default=1500, help="steps")
    add("--learning_rate", type=at_least(0, float), default=1e-3, help="of Adam")
    add("--resample", type=step_list, default="auto",
        help="steps after which dead features are resampled, with commas; none; auto: as the "
        "recipe has it, in runs of fewer than 200,000 steps after 4 to 9 tenths")
    add("--dead_steps", type=at_least(1),
        help="a feature is dead when it was silent for so many steps, by default 12,500, or a "
        "tenth of a run of fewer than 200,000 steps")
    add("--log_interval", type=step_count, default="auto",
        help="steps between lines of log.jsonl; auto: 50, or a 500th of a long run")
    add("--save_interval", type=step_count, default="auto",
        help="steps between checkpoints; auto: 500, or a twentieth of a long run")
    add("--resume", action="store_true",
        help="go on from the last checkpoint, if there is one")
    return parser.parse_args()


# -----------------------------------------------------------------------------
# activations: of the model, of known directions, or somebody's own


def row_places(n_contexts, T, start, n):
    """
    Where in the text rows start .. start + n of an endless sequence are: indices (n,) of tokens.

    The text is n_contexts of T tokens. Each is visited once, in random order, and gives a
    random half of its tokens; then each once more, for the other half; then it begins anew, in
    another order. So few rows are of one context, and none comes twice before all have come.
    (Bricken et al., appendix on the data set, take 250 tokens of each context, whose length
    they do not state.)
    """
    n_kept = max(1, T // 2)  # tokens of each visit
    visits = T // n_kept     # of each context: 2, or 1 or 3 where T is tiny
    # those that are needed, counted from the beginning
    first_visit = start // n_kept
    last_visit = (start + n - 1) // n_kept
    places = []
    for round_number in range(first_visit // n_contexts, last_visit // n_contexts + 1):
        epoch, visit = divmod(round_number, visits)
        rng = np.random.default_rng(epoch)  # all visits of an epoch draw the same:
        contexts = rng.permutation(n_contexts)
        tokens = rng.permutation(T)[visit * n_kept:(visit + 1) * n_kept]
        shifts = rng.integers(0, T, n_contexts)  # or all contexts would keep the same tokens

        # which part of this round is needed
        before = round_number * n_contexts  # visits of the rounds before
        contexts = contexts[max(0, first_visit - before):last_visit + 1 - before]
        kept = (tokens + shifts[contexts, None]) % T  # (some contexts, n_kept)
        places.append((contexts[:, None] * T + kept).ravel())
    offset = start - first_visit * n_kept
    return np.concatenate(places)[offset:offset + n]


@torch.no_grad()
def gpt_rows(gpt, tokens, site, start, n, rank=0, ranks=1):
    """
    Rows start .. start + n of the activations at a site (n, width), float16, shuffled: those
    of one context lie far apart. Which tokens they are of: see row_places.

    tokens: (many,) token ids. Each of several ranks computes its share of the contexts and
    leaves the other rows 0: see `gathered`.
    """
    T = gpt.config.block_size
    device = gpt.wte.weight.device
    places = row_places(len(tokens) // T, T, start, n)
    places = np.random.default_rng(start).permutation(places)
    # the rows are shuffled now; they are computed in the order of the text
    order = np.argsort(places)
    places = places[order]

    # each context is computed once, even where a short text comes round again
    contexts, context_of_row = np.unique(places // T, return_inverse=True)
    idx = tokens[contexts[:, None] * T + np.arange(T)].astype(np.int64)  # (contexts, T)
    token_of_row = context_of_row * T + places % T  # (n,) in idx.flatten()

    # all at once, or a GPU would have to wait in between
    idx = to_device(idx, device)
    token_of_row = to_device(token_of_row, device)
    order = to_device(order, device)
    tokens_at_once = 8192 if device.type == "cpu" else 34_000  # a GPU wants more at once
    B = max(1, tokens_at_once // T)  # contexts at once
    rows = torch.zeros(n, gpt.site_width(site), dtype=torch.float16, device=device)
    for i in range(rank * B, len(contexts), ranks * B):
        x = gpt.activations(idx[i:i + B], site).flatten(0, 1)  # (B * T, width)
        # which of the rows come from these contexts
        first, last = np.searchsorted(context_of_row, (i, i + B))
        rows[order[first:last]] = x[token_of_row[first:last] - i * T].half()
    if ranks == 1:
        check_rows(rows, site)
    return rows


def check_rows(rows, site):
    """UserError unless the rows (n, width) of a site are finite."""
    if not all_finite(rows):
        raise UserError(
            f"activations of {site} are NaN or beyond float16 (65,504): train another model"
        )


def gathered(site, rows):
    """
    Rows (n, width) of which each rank has made a share, the others being 0 -> all of them, on
    every rank. With one rank nothing happens. UserError, on all ranks, unless they are finite.
    """
    if dist.is_initialized():
        dist.all_reduce(rows)  # the sum
        check_rows(rows, site)
    return rows


def toy_rows(directions, offset, n, key, n_active=3.0):
    """
    n toy activations with known truth (n, width) float16: direction i of `directions` (k,
    width) is on with a probability that falls by e^2 from the first to the last, n_active of
    them on average, each with a strength uniform in (0, 1). offset (width,) is added to all.
    """
    rng = np.random.default_rng(key)
    k = len(directions)
    odds = np.exp(-2 * np.arange(k) / (k - 1))
    on = rng.random((n, k), dtype=np.float32) < odds * n_active / odds.sum()  # (n, k)
    strengths = on * rng.random((n, k), dtype=np.float32)                     # (n, k)
    return torch.from_numpy(strengths @ directions + offset).half()           # (n, width)


def from_gpt(args, device):
    """
    Returns where rows of the model come from, their width, and make(split, start, n), which
    makes rows start .. start + n of the endless sequence of a split, "train" or "val"; with
    rank and ranks a rank's share of them: see gpt_rows.
    """
    site = f"{args.site}.{args.layer}"
    gpt, _ = load_gpt(args.out_dir, device)
    if args.shuffle_weights:
        gpt = shuffled_weights(gpt)
    width = gpt.site_width(site)
    tokens = {}
    for split in ("train", "val"):
        tokens[split] = load_tokens(args.out_dir, split, gpt.config)

    def make(split, start, n, rank=0, ranks=1):
        return gpt_rows(gpt, tokens[split], site, start, n, rank, ranks)

    source = {"site": site, "gpt": gpt.fingerprint()}
    if args.shuffle_weights:  # analyze.py shuffles them again
        source["shuffled"] = True
    return source, width, make


def from_toy(args, n_directions=256, width=64):
    """The same for rows made of known directions, more of them than the width has dimensions."""
    rng = np.random.default_rng(TOY_SEED)
    truth = rng.standard_normal((n_directions, width), dtype=np.float32)
    truth /= np.linalg.norm(truth, axis=1, keepdims=True)
    offset = rng.standard_normal(width, dtype=np.float32)
    offset *= args.toy_offset / np.linalg.norm(offset)

    def make(split, start, n, rank=0, ranks=1):
        if rank > 0:  # rank 0's share is all, since they cost little
            return torch.zeros(n, width, dtype=torch.float16)
        return toy_rows(truth, offset, n, (split == "val", start))

    source = {"site": "toy", "offset": args.toy_offset, "truth": torch.from_numpy(truth)}
    return source, width, make


def own_stores(args, device):
    """The pattern --acts -> stores of the first 95 % of the rows and of the rest, source."""
    paths = matching_files(args.acts)
    source = own_source(paths, os.path.join(args.out_dir, "sae", args.name))
    store = ActivationStore(paths, args.seed, TRAINED_ON, device)
    # of many only VAL_ROWS are looked at: in one order for all seeds, or each would see others
    val_store = ActivationStore(paths, part=HELD_OUT, device=device)
    shape = np.load(paths[0], mmap_mode="r").shape  # the first file's: the others will be alike
    if len(shape) > 2:
        print(f"{paths[0]}: shape {shape} is read as rows of {store.width}, the last dimension")
    return store, val_store, source


def prepare(args, device, checkpoint=None):
    """
    --acts -> store of training rows, store of held-out rows, and source, a dict that says
    where they come from: it is kept with the autoencoder, for --resume and for analyze.py.
    UserError when the checkpoint, if there is one, was trained on others.
    """
    if args.acts not in ("gpt", "toy"):
        return own_stores(args, device)
    source, width, make = from_gpt(args, device) if args.acts == "gpt" else from_toy(args)
    if checkpoint:  # before rows are written to disk that would be refused
        check_source(source, checkpoint)
    # rows as they are needed, the same as the files on disk would hold
    if args.stream:
        rank, ranks, _ = torchrun_ranks()

        def make_together(split, start, n):
            return gathered(source["site"], make(split, start, n, rank, ranks))

        store = ActivationStream(partial(make_together, "train"), width)
        # by shards as long as the one on disk, or they would hold other rows
        val_store = ActivationStream(partial(make_together, "val"), width, VAL_ROWS)
        return store, val_store, source
    # All that the rows on disk depend on: they are made anew when one of these changes. Neither
    # the seed nor --n_acts is among them, so that runs side by side share the files.
    meta = {
        "site": args.site,
        "layer": args.layer,
        "gpt": source.get("gpt"),
        "offset": source.get("offset"),
        "width": width,
        "version": ROWS_VERSION,
    }
    # the shuffled model's have their own folder: in one, each run would remove the other's
    control = "-shuffled" if args.shuffle_weights else ""
    folder = os.path.join(args.out_dir, "acts", source["site"] + control)
    train_paths, val_paths = dump(folder, meta, make, args.n_acts)
    store = ActivationStore(train_paths, args.seed, device=device)
    val_store = ActivationStore(val_paths, args.seed, device=device)
    return store, val_store, source


# -----------------------------------------------------------------------------
# activations on disk


@dataclass
class Shard:
    """One .npy file of a dump: rows start .. start + rows of the sequence of its split."""
    path: str
    split: str  # "train" or "val"
    start: int
    rows: int


def plan_shards(folder, n_acts):
    """
    Returns the Shards for n_acts training rows or more, all of the same length, so that a
    shard never depends on how many there are, and the one of held-out rows.
    """
    shards = []
    for start in range(0, n_acts, SHARD_ROWS):
        path = os.path.join(folder, f"train-{start // SHARD_ROWS:03d}.npy")
        shards.append(Shard(path, "train", start, SHARD_ROWS))
    path = os.path.join(folder, "val-000.npy")
    shards.append(Shard(path, "val", 0, min(VAL_ROWS, SHARD_ROWS)))
    return shards


def dump(folder, meta, make, n_acts):
    """
    Fills folder with train-NNN.npy and val-000.npy, of the rows of make(split, start, n).
    Files that are there already and go with meta stay as they are, also those that are more
    than n_acts needs.

    meta: what the rows depend on, with "width"; it is kept in meta.json.
    Returns the paths of the training shards and those of the held-out one. UserError when
    there is no room, or when files would have to go that another run may be reading.
    """
    # no disk holds so many, and the list of their files would take minutes
    if n_acts > 2**40:
        raise UserError(f"--n_acts={n_acts}: lower --n_acts or use --stream")
    shards = plan_shards(folder, n_acts)
    with rank_0_first():
        missing = clear_folder(folder, meta, shards)
    rank, ranks, _ = torchrun_ranks()  # each rank writes its share
    mine = [shard for shard in shards[rank::ranks] if shard in missing]
    for shard in tracked("writing activations", mine, "rows", lambda shard: shard.rows):
        rows = make(shard.split, shard.start, shard.rows).cpu().numpy()
        write_atomic(shard.path, lambda file: np.save(file, rows))
    if ranks > 1:
        dist.barrier()  # until all files are there
    paths = [shard.path for shard in shards]
    return paths[:-1], paths[-1:]


def clear_folder(folder, meta, shards):
    """
    Makes the folder, with its meta.json, and removes the files that do not go with meta. Returns
    those of the shards that are missing then. UserError as `dump` has it.
    """
    os.makedirs(folder, exist_ok=True)
    # nobody starts reading until it is clear which files are good
    alone = lock_alone(folder)
    if not alone:
        lock_shared(folder)
    meta_path = os.path.join(folder, "meta.json")
    # what is there already: all of it is good, or all of it was made from something else
    meta_then = load_json(meta_path, f"delete {folder}") if os.path.exists(meta_path) else {}
    present = glob.glob(os.path.join(glob.escape(folder), "*.npy"))
    good, outdated = (present, []) if meta_then == meta else ([], present)
    if outdated and not alone:
        raise UserError(
            f"{folder} holds activations of something else, which another run is reading: "
            "wait for it, or give another --out_dir"
        )
    missing = [shard for shard in shards if shard.path not in good]
    check_room(folder, meta, shards, missing, outdated)

    # in this order, so that after a kill, too, a shard goes with the meta.json beside it
    if meta_then != meta:
        for path in outdated:
            os.remove(path)
        save_json(meta_path, meta)
    # from here on others may join, and write the same files
    lock_shared(folder)
    return missing


def check_room(folder, meta, shards, missing, outdated):
    """
    Prints how many of the shards are missing and what room they take. UserError, before anything
    is touched, when they do not fit on the disk, even when the outdated files are gone.
    """
    needed = sum(shard.rows for shard in missing) * meta["width"] * 2  # bytes of float16
    free = shutil.disk_usage(folder).free + sum(map(os.path.getsize, outdated))
    n_rows = sum(shard.rows for shard in shards)
    print(
        f"activations: {n_rows:,} rows of {meta['width']} in {folder}; "
        f"{len(shards) - len(missing)} of {len(shards)} files are there, the others need "
        f"{needed / 1e9:.2f} of {free / 1e9:.1f} GB that are free"
    )
    if needed > free:
        raise UserError(
            f"{folder} needs {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free: "
            "lower --n_acts or use --stream"
        )


# -----------------------------------------------------------------------------
# training


@dataclass
class Training:
    """A run, and what its checkpoint keeps beside the flags: enough to go on from there."""
    path: str     # of the checkpoint
    source: dict  # where the rows come from: see `prepare`
    sae: SparseAutoencoder
    optimizer: torch.optim.Adam
    last_fired: torch.Tensor  # (n_features,) step in which each was last active or resampled
    step: int                 # how many are done
    log: list                 # the lines of log.jsonl, dicts


def begin_training(path, source, store, args, device):
    """Returns a Training at its first step, with the autoencoder fitted to a sample of the rows."""
    if store.rows < args.batch_size:
        raise UserError(
            f"--batch_size={args.batch_size} is more than the {store.rows:,} rows there are"
        )
    sample = store.sample(32768, (args.seed, FIRST_SAMPLE)).to(device)
    # NaN is refused, too; correction=0, since that of one row is then 0
    if not 0 < sample.float().var(0, correction=0).sum() < math.inf:
        reason = "are all the same, or too large or too small for float32"
        raise UserError(f"the activations {reason}")
    print(mean_note(mean_share(sample), args.center))
    share = massive_share(sample)
    if share > MASSIVE:
        print(massive_note(share, args.input_norm))

    pre_bias = {"auto": None, "yes": True, "no": False}[args.pre_bias]
    config = SAEConfig(
        d_in=store.width,
        n_features=args.n_features,
        recipe=args.recipe,
        input_norm=args.input_norm,
        center=args.center,
        decoder_norm=args.decoder_norm,
        pre_bias=pre_bias,
        start=None if args.start == "auto" else args.start,
    )
    sae = SparseAutoencoder(config).to(device)
    sae.fit_to(sample)
    try_out(sae, sample[:256].float(), args.l1_coeff)
    fused = device.type != "mps"  # one kernel for all weights; mps has none
    optimizer = torch.optim.Adam(sae.parameters(), betas=(0.9, 0.999), fused=fused)
    last_fired = torch.zeros(args.n_features, dtype=torch.long, device=device)
    return Training(path, source, sae, optimizer, last_fired, step=0, log=[])


def try_out(sae, x, l1_coeff):
    """
    UserError where a recipe, or a change to the autoencoder, cannot train on x (N, d_in), or where
    SparseStep or fold() would compute something else.
    """
    # with the full lambda, which may be 0 in the first step and hide what is wrong
    loss, gradients = loss_and_gradients(sae, x, l1_coeff)
    if not all(value.isfinite().all() for value in [loss, *gradients]):
        raise UserError(
            "the loss or its slope is not finite before the first step, so no learning rate will "
            "do: look at the recipe's activation and penalty, whose slopes must be finite, at 0, "
            "too, or at the size of the activations"
        )
    if sae.recipe.penalty is not None and l1_coeff > 0:
        _, without = loss_and_gradients(sae, x, 0.0)
        if all(map(torch.equal, gradients, without)):
            raise UserError(
                "lambda changes nothing: the slope of the recipe's penalty is 0 everywhere, as "
                "that of a count is"
            )
    if sae.sparse_runs(sae.scaled(x)):
        sparse_loss, _ = sae.loss(x, l1_coeff, sparse=True)
        if not torch.isclose(loss, sparse_loss, rtol=1e-3):
            raise UserError(
                "SparseStep computes another loss than the equations in `loss`, `pre_activations` "
                "and `reconstruct`: let `sparse_is_exact` return False"
            )
    if sae.recipe.resample_steps:
        if not torch.isclose(loss, sae.losses(x, l1_coeff).mean(), rtol=1e-3):
            raise UserError(
                "`losses`, which resampling draws by, and `loss` say different things: a term "
                "that is added to one belongs in the other"
            )
    with torch.no_grad():
        x_hat = sae(x)
        if (x_hat - sae.fold()(x)).abs().max() > 0.01 * x_hat.abs().max():
            reason = "fold() gives other reconstructions than `encode` and `decode`"
            raise UserError(f"{reason}: a change to these belongs there, too")


def loss_and_gradients(sae, x, l1_coeff):
    """The loss of x (N, d_in) by the dense equations, and its gradients, a list of tensors."""
    loss, _ = sae.loss(x, l1_coeff, sparse=False)
    gradients = torch.autograd.grad(loss, list(sae.parameters()), allow_unused=True)
    return loss, [gradient for gradient in gradients if gradient is not None]


def mean_note(share, center):
    """Says what share of the squared norm the mean holds, and what to do when it is large."""
    note = f"the mean holds {share:.1%} of the activations' squared norm"
    if center:
        return f"{note}: it is taken off"
    if share > LARGE_MEAN:
        return f"{note}: features against it never fire, so many may die; try --center"
    return note


def massive_note(share, input_norm):
    """Says what share of the squared norm few rows hold, and what to do."""
    note = f"the largest 1% of the rows hold {share:.1%} of the activations' squared norm"
    if input_norm == "token":
        return f"{note}: each is divided by its own"
    return f"{note}: little is left for the others; try --input_norm=token, or drop those rows"


def check_source(source, checkpoint):
    """UserError when a checkpoint was trained on other rows than those of a source."""
    source_then = checkpoint.get("source", {})
    # not the truth, a tensor that is the same in every run; nor where the same files lie
    keys = source.keys() - {"truth", "paths"}
    if any(source_then.get(key) != source[key] for key in keys):
        reason = "the checkpoint was trained on other activations than there are now"
        raise UserError(f"{reason}: {ANEW}, with another --name to keep this one")


def restore(training, checkpoint):
    """Takes a Training to where its checkpoint is. UserError if that was trained on other rows."""
    check_source(training.source, checkpoint)
    with reading(training.path, ANEW):
        restore_sae(training.sae, checkpoint)
        training.optimizer.load_state_dict(checkpoint["optimizer"])
        training.last_fired = checkpoint["last_fired"]
        training.step = checkpoint["step"]
        training.log = [dict(line) for line in checkpoint["log"]]


def save(training, loss, args, rank):
    """
    Writes log.jsonl, and the checkpoint last: where it says that the run is finished, all is
    there. UserError, on all ranks, when the loss or a weight is not finite.
    """
    check_finite(loss.item(), training.sae, training)
    if rank > 0:
        return
    folder = os.path.dirname(training.path)
    save_jsonl(os.path.join(folder, "log.jsonl"), training.log)
    save_sae(
        training.path,
        training.sae,
        source=training.source,
        optimizer=training.optimizer.state_dict(),
        step=training.step,
        last_fired=training.last_fired,
        log=training.log,
        args=vars(args),
    )


def fired_on_any_rank(fired):
    """bool (n_features,) of this rank's rows -> of the rows of all ranks."""
    if not dist.is_initialized():
        return fired
    fired = fired.byte()  # bool cannot be sent
    dist.all_reduce(fired, dist.ReduceOp.MAX)
    return fired.bool()


def resample(training, dead, store, l1_coeff, args):
    """Gives dead features a new start, from a fresh sample of rows."""
    key = (args.seed, RESAMPLING, training.step - 1)
    n_rows = min(100 * args.batch_size, RESAMPLING_ROWS)  # 100 batches are the paper's, too
    inputs = store.sample(n_rows, key).to(dead.device)
    generator = torch.Generator().manual_seed(args.seed + training.step)
    n_resampled = training.sae.resample(dead, inputs, training.optimizer, l1_coeff, generator)

    # ranks may differ in the last bit of a loss, and so in what they drew
    same_on_all_ranks(training.sae.parameters())
    training.last_fired[dead] = training.step  # time to show what they can do
    print(f"step {training.step:,}: resampled {n_resampled:,} dead features")


def log_line(training, x, loss, stats, dead, l1_coeff, args):
    """Returns a line of log.jsonl as a dict. x: the batch (N, d_in) of which loss and stats are."""
    variance = variance_of(training.sae.scaled(x)) / len(x)  # in the units of stats["mse"]
    return {
        "step": training.step,
        "rows": training.step * args.batch_size,
        "loss": loss.item(),
        # mse, l1, l0, and whatever else the loss adds to its stats
        **{name: value.item() for name, value in stats.items() if value.dim() == 0},
        "dead": dead.float().mean().item(),
        "variance_explained": explained_share(stats["mse"].item(), variance),
        "l1_coeff": l1_coeff,
        "learning_rate": training.optimizer.param_groups[0]["lr"],
    }


def log_note(line):
    """A line of the log as the progress shows it."""
    return (
        f"loss {line['loss']:.2f}  L0 {line['l0']:.1f}  "
        f"variance explained {show_explained(line['variance_explained'])}  "
        f"dead {line['dead']:.1%}"
    )


def train(training, store, val_store, args, machine):
    """
    Trains until args.max_iters steps are done or somebody interrupts, and saves. A run that is
    done is judged on val_store before. What only some recipes do is called for all of them, and
    looks into the recipe itself.
    """
    sae, optimizer, recipe = training.sae, training.optimizer, training.sae.recipe
    loss_of = torch.compile(sae.loss) if machine.compiled else sae.loss
    # the recipe's schedule, unless a flag says otherwise
    resample_steps, dead_steps = resample_schedule(args.max_iters, recipe)
    if args.resample != "auto":
        resample_steps = args.resample
    if args.dead_steps:
        dead_steps = args.dead_steps
    log_interval = interval(args.log_interval, args.max_iters, 50, times=500)
    save_interval = interval(args.save_interval, args.max_iters, 500, times=20)
    progress = Progress("training", args.max_iters, "steps", training.step)

    for step in steps(training.step, args.max_iters):
        # the batch and the schedules: functions of the step alone, so nothing is to remember
        x = store.batch(step * args.batch_size, args.batch_size, machine.rank, machine.ranks)
        x = x.to(machine.device)
        l1_coeff = l1_at(step, args.max_iters, args.l1_coeff, recipe)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, args.max_iters, args.learning_rate, recipe)

        # a step of Adam
        # lambda as a tensor, or torch.compile would compile again when it changes; torch.full,
        # as a GPU would have to wait for torch.tensor
        l1_tensor = torch.full((), l1_coeff, device=machine.device)
        with machine.autocast:
            loss, stats = loss_of(x, l1_tensor)
        optimizer.zero_grad()
        loss.backward()
        average_gradients(sae)  # over the ranks
        sae.remove_parallel_gradient()
        if recipe.clip:
            torch.nn.utils.clip_grad_norm_(sae.parameters(), recipe.clip)
        optimizer.step()
        sae.normalize_decoder()

        # the silent features, and a new start for them
        training.step = step + 1
        training.last_fired.masked_fill_(fired_on_any_rank(stats["fired"]), training.step)
        dead = training.step - training.last_fired >= dead_steps
        if training.step in resample_steps:
            check_finite(loss.item(), sae, training)
            resample(training, dead, store, l1_coeff, args)

        # what is written down
        finished = training.step == args.max_iters
        if training.step % log_interval == 0 or finished:
            check_finite(loss.item(), sae, training)
            training.log.append(log_line(training, x, loss, stats, dead, l1_coeff, args))
        if training.log:  # else there is nothing to show yet
            progress.show(training.step, lambda: log_note(training.log[-1]), finished)
        if training.step % save_interval == 0 and not finished:
            save(training, loss, args, machine.rank)
    if training.step == args.max_iters:  # before it is saved as finished, so that none lacks it
        judge(training, val_store, args, machine.device)
    save(training, loss, args, machine.rank)


@torch.no_grad()
def judge(training, val_store, args, device):
    """
    Prints how well some held-out rows are explained, and adds the loss of more of them to the
    last line of the log: by it analyze.py compares runs.
    """
    sae = training.sae
    x = val_store.batch(0, min(2048, val_store.rows)).to(device)  # (N, d_in), raw
    l0 = (sae.encode(x) > 0).sum() / len(x)
    error = (sae(x) - x).cpu().double().square().sum().item()
    share = show_explained(explained_share(error, variance_of(x)))
    rows = "row" if len(x) == 1 else "rows"
    print(f"{len(x):,} held-out {rows}: variance explained {share} at L0 {l0:.1f}")
    training.log[-1]["held_out_loss"] = held_out_loss(sae, val_store, args.l1_coeff, device)


def held_out_loss(sae, val_store, l1_coeff, device):
    """The recipe's loss with this lambda, its mean over held-out rows, at most VAL_ROWS of them."""
    # the same rows for every run on the same data
    n_rows = min(VAL_ROWS, val_store.rows)
    total = 0.0
    for start in range(0, n_rows, 4096):
        x = val_store.batch(start, min(4096, n_rows - start)).to(device)
        loss, _ = sae.loss(x, l1_coeff)
        total += loss.item() * len(x)
    return total / n_rows


def main():
    args = parse_args()
    if args.name == "auto":
        args.name = args.recipe
    if not re.fullmatch(r"\w[\w.-]*", args.name):
        rule = "use letters, digits, '.', '_' and '-'"
        raise UserError(f"--name={args.name} is no name for a folder: {rule}")
    if args.pre_bias == "yes" and RECIPES[args.recipe].tied:
        reason = "its weights are tied, so there is no b_dec to subtract"
        raise UserError(f"--pre_bias=yes is not for --recipe={args.recipe}: {reason}")
    if args.shuffle_weights and args.acts != "gpt":
        raise UserError("--shuffle_weights is for a model's activations: give no --acts with it")
    machine = setup(args)
    # of all ranks together, here and in the checkpoint
    args.batch_size *= machine.ranks
    folder = os.path.join(args.out_dir, "sae", args.name)
    # an error now rather than after an hour
    os.makedirs(folder, exist_ok=True)
    if machine.rank == 0 and not lock_alone(folder):
        raise UserError(f"another run is training {folder}: wait for it, or give another --name")
    path = os.path.join(folder, "sae.pt")
    checkpoint = resumable(path, args, machine.device)
    store, val_store, source = prepare(args, machine.device, checkpoint)
    source["rows"] = store.rows

    training = begin_training(path, source, store, args, machine.device)
    if checkpoint:
        restore(training, checkpoint)
    same_on_all_ranks([*training.sae.parameters(), *training.sae.buffers()])
    scale = training.sae.scale.item()
    total = f" of {store.rows:,}" if math.isfinite(store.rows) else ", made as they are needed"
    print(
        f"sae: {args.recipe}, {store.width} -> {args.n_features:,} features, "
        f"scale {scale:.4g}, {args.max_iters * args.batch_size:,} rows{total}, "
        f"on {machine.device}"
    )
    if args.input_norm != "token":
        theirs = paper_lambda(args.l1_coeff, store.width, scale)
        print(f"lambda {args.l1_coeff:g} is {theirs:.3g} in the units of Bricken et al.")
    train(training, store, val_store, args, machine)
    if training.step < args.max_iters:
        raise KeyboardInterrupt(f"step {training.step:,}")  # `run` says how to go on

    command = "analyze.py toy" if args.acts == "toy" else "analyze.py"
    out_dir = shlex.quote(args.out_dir)
    print(f"wrote {path}; next: python {command} --name={args.name} --out_dir={out_dir}")


if __name__ == "__main__":
    run(main)
