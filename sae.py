"""
The sparse autoencoder: three published recipes, the exact sparse step, and the store of activations it trains on.

    tied      Cunningham et al. 2023, "Sparse Autoencoders Find Highly Interpretable Features" (arXiv 2309.08600)
    towards   Bricken et al. 2023, "Towards Monosemanticity" (transformer-circuits.pub/2023/monosemantic-features)
    scaling   Templeton et al. 2024, "Scaling Monosemanticity" (transformer-circuits.pub/2024/scaling-monosemanticity)

One activation vector x of width n becomes m feature activations f, most of them 0, and back:

              f                                  x_hat             loss, averaged over the batch
    tied      ReLU(x W_dec^T + b_enc)            f W_dec           ||x - x_hat||^2 + lambda sum_i f_i
    towards   ReLU((x - b_dec) W_enc + b_enc)    f W_dec + b_dec   ||x - x_hat||^2 + lambda sum_i f_i
    scaling   ReLU(x W_enc + b_enc)              f W_dec + b_dec   ||x - x_hat||^2 + lambda sum_i f_i ||W_dec_i||

Both terms are sums over their axis (width, features) and means over the batch, so lambda means the same at any size.
Row i of W_dec is feature i's direction: of unit norm in tied and towards, free in scaling.

Notable:
- with ReLU the gradient is zero wherever a feature is off, so SparseStep computes it there and nowhere else: exact,
  and several times faster than the dense step on a CPU
- fold() brings every recipe into one form, ReLU(x W_enc + b_enc) W_dec + b_dec with unit rows, for all that comes after
- names and shapes of the weights are those of SAELens
"""
import math
import warnings

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from model import UserError, load_checkpoint, reading, save_checkpoint

warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")

RECIPES = ("scaling", "towards", "tied")
SHARD_ROWS = 2**17  # rows of activations that are made, shuffled and written at a time


class SparseStep(torch.autograd.Function):
    """
    x_hat = ReLU(x W_enc + b_enc) W_dec + b_dec and its gradient, exact, at the cost of little more than one dense
    product (the encoder's): everything else touches the active entries alone. With f as a CSR matrix and g = dL/df,
    which only matters where f > 0:

        g = x_hat.grad W_dec^T, sampled at f > 0;   W_dec.grad = f^T x_hat.grad;   W_enc.grad = x^T g

    x (B, n) -> x_hat (B, n), f.sum(0) (m,), number of active entries. Needs a CPU and torch's MKL.
    """
    @staticmethod
    def forward(ctx, x, W_enc, b_enc, W_dec, b_dec):
        (B, _), m = x.shape, len(b_enc)
        f, where, values = x.new_empty(512, m), [], []
        for i in range(0, B, 512):  # the only dense product, in pieces that stay in the processor's cache
            piece = torch.mm(x[i:i + 512], W_enc, out=f[:len(x[i:i + 512])])
            on = torch.from_numpy(np.flatnonzero((piece > -b_enc).numpy()))        # numpy's is the faster search
            where.append(on + i * m)
            values.append(piece.view(-1)[on])
        where = torch.cat(where)                                                   # row * m + column, in order
        rows, columns = torch.searchsorted(where, torch.arange(0, B * m + 1, m)), where % m
        values = torch.cat(values) + b_enc[columns]
        f = torch.sparse_csr_tensor(rows, columns, values, (B, m), check_invariants=False)
        ctx.save_for_backward(x, W_enc, W_dec, rows, columns, values)
        return f @ W_dec + b_dec, values.new_zeros(m).index_add_(0, columns, values), rows[-1]

    @staticmethod
    def backward(ctx, grad_x_hat, grad_f_sum, _):
        x, W_enc, W_dec, rows, columns, values = ctx.saved_tensors
        shape = (len(x), len(W_dec))
        f = torch.sparse_csr_tensor(rows, columns, values, shape, check_invariants=False)
        through_f_sum = torch.sparse_csr_tensor(rows, columns, grad_f_sum[columns], shape, check_invariants=False)
        g = torch.sparse.sampled_addmm(through_f_sum, grad_x_hat, W_dec.t())       # (B, m), where f > 0
        grad_x = g @ W_enc.t() if ctx.needs_input_grad[0] else None
        grad_b_enc = torch.zeros_like(W_dec[:, 0]).index_add_(0, columns, g.values())
        return grad_x, (g.t() @ x).t(), grad_b_enc, f.t() @ grad_x_hat, grad_x_hat.sum(0)


class SparseAutoencoder(nn.Module):
    """
    W_enc (d_in, n_features), b_enc (n_features,), W_dec (n_features, d_in), b_dec (d_in,); for tied, W_enc is W_dec.T
    and b_dec is 0. `scale` (scalar, 1 until fit_to) takes raw activations to the units in which the loss is measured.

    recipe: "scaling", "towards" or "tied". decoder_norm: L2 norm of every decoder row at the start (scaling only; the
    April 2024 update suggests 0.05 to 1). input_norm: "dataset" (one scalar for all, E||x||^2 = d_in), "token" (each
    vector to ||x||^2 = d_in, the other reading of Templeton et al.) or "none" (raw units). pre_bias: whether b_dec is
    subtracted before W_enc is applied; None: as the recipe has it, in towards alone.

    Initialisation: random directions, W_enc = W_dec^T, biases 0 (April 2024 update; towards and tied take the same,
    with unit rows). W_enc is stored as a transposed matrix, each feature's weights side by side: that is the layout in
    which SparseStep makes its gradient.
    """

    def __init__(self, d_in, n_features, recipe="scaling", input_norm="dataset", decoder_norm=0.3, pre_bias=None):
        super().__init__()
        for value, known in ((recipe, RECIPES), (input_norm, ("dataset", "token", "none"))):
            if value not in known:
                raise UserError(f"{value} is unknown: it must be one of {', '.join(known)}")
        self.d_in, self.n_features, self.recipe, self.input_norm = d_in, n_features, recipe, input_norm
        self.pre_bias = recipe == "towards" if pre_bias is None else pre_bias
        directions = F.normalize(torch.randn(n_features, d_in), dim=1)
        self.W_dec = nn.Parameter(directions * (decoder_norm if recipe == "scaling" else 1.0))
        self.b_enc = nn.Parameter(torch.zeros(n_features))
        if recipe == "tied":
            self.register_buffer("b_dec", torch.zeros(d_in), persistent=False)
        else:
            self.W_enc = nn.Parameter(self.W_dec.detach().clone().t())
            self.b_dec = nn.Parameter(torch.zeros(d_in))
        self.register_buffer("scale", torch.tensor(1.0), persistent=False)  # saved beside the weights, by save_sae

    def __getattr__(self, name):  # only asked for what is not found otherwise: a tied autoencoder's encoder
        if name == "W_enc" and self.recipe == "tied":
            return self.W_dec.t()
        return super().__getattr__(name)

    @torch.no_grad()
    def fit_to(self, x):
        """Starting point from a sample x (N, d_in) of raw activations: the scale, and for towards b_dec."""
        x = x.float()
        if self.input_norm != "none":  # E||x||^2 = d_in (Scaling Monosemanticity, Methods)
            self.scale.fill_(math.sqrt(self.d_in / x.square().sum(1).mean().clamp_min(1e-30).item()))
        if self.recipe == "towards":   # (Towards Monosemanticity, appendix on the autoencoder's training)
            self.b_dec.copy_(geometric_median(x * self.input_scale(x)))

    def input_scale(self, x):
        """What raw x (..., d_in) is multiplied by: `scale`, or with input_norm="token" sqrt(d_in) / ||x||; (..., 1)."""
        if self.input_norm != "token":
            return self.scale.expand(*x.shape[:-1], 1)
        return math.sqrt(self.d_in) / x.float().norm(dim=-1, keepdim=True).clamp_min(1e-8)

    def encoder_input(self, x):
        """Scaled x -> what W_enc is applied to."""
        return x - self.b_dec if self.pre_bias else x

    def encode(self, x):
        """(..., d_in) raw activations -> f (..., n_features)."""
        x = x.to(self.W_dec.dtype) * self.input_scale(x)
        return F.relu(self.encoder_input(x) @ self.W_enc + self.b_enc)

    def decode(self, f, scale=None):
        """f (..., n_features) -> x_hat (..., d_in) in raw units. scale: input_scale(x), only for input_norm="token"."""
        return (f @ self.W_dec + self.b_dec) / (self.scale if scale is None else scale)

    def forward(self, x, l1_coeff=None):
        """(..., d_in) raw activations -> their reconstruction; with l1_coeff their loss, for what wraps forward."""
        return self.decode(self.encode(x), self.input_scale(x)) if l1_coeff is None else self.loss(x, l1_coeff)

    def loss(self, x, l1_coeff, sparse=None):
        """
        x (N, d_in) raw, l1_coeff = lambda -> loss, and stats: mse and l1 (the two terms without lambda), l0 (active
        features a vector), fired (n_features,) bool. Scaled units. sparse: True and False force the exact sparse and
        the dense step; None takes the sparse one where it can and fewer than one entry in ten is active.
        """
        x = x.to(self.W_dec.dtype) * self.input_scale(x)
        x_in = self.encoder_input(x)
        if sparse or (sparse is None and self.sparse_pays(x_in)):
            x_hat, f_sum, n_active = SparseStep.apply(x_in, self.W_enc, self.b_enc, self.W_dec, self.b_dec)
        else:
            f = F.relu(x_in @ self.W_enc + self.b_enc)                             # (N, m)
            x_hat = f @ self.W_dec + self.b_dec                                    # (N, n)
            f_sum, n_active = f.sum(0, dtype=self.W_dec.dtype), (f > 0).sum()
        mse = (x_hat - x).square().sum() / len(x)       # sum over the width, mean over the batch
        weighted = f_sum * self.W_dec.norm(dim=1) if self.recipe == "scaling" else f_sum
        l1 = weighted.sum() / len(x)                    # sum over the features, mean over the batch
        stats = {"mse": mse.detach(), "l1": l1.detach(), "l0": n_active / len(x), "fired": f_sum.detach() > 0}
        return mse + l1_coeff * l1, stats

    @torch.no_grad()
    def sparse_pays(self, x_in):
        """Whether SparseStep runs here, and fewer than one entry in ten is active in the batch's first 64 vectors."""
        if (x_in.device.type != "cpu" or x_in.dtype != torch.float32 or torch.is_autocast_enabled("cpu")
                or not torch.backends.mkl.is_available()):
            return False
        return (x_in[:64] @ self.W_enc + self.b_enc > 0).float().mean().item() < 0.1

    @torch.no_grad()
    def remove_parallel_gradient(self):
        """
        towards, before each Adam step: the part of W_dec's gradient that is parallel to each (unit) row is removed,
        or Adam would see a pull that the normalisation undoes (Towards Monosemanticity, appendix).
        """
        if self.recipe == "towards":
            W, grad = self.W_dec, self.W_dec.grad
            grad -= (grad * W).sum(1, keepdim=True) * W

    @torch.no_grad()
    def normalize_decoder(self):
        """towards and tied, after each Adam step: every row of W_dec back to unit L2 norm."""
        if self.recipe != "scaling":
            self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)

    @torch.no_grad()
    def resample(self, dead, x, optimizer, l1_coeff, generator=None):
        """
        Gives every dead feature a new start at an input that the autoencoder reconstructs badly (Towards
        Monosemanticity, appendix on neuron resampling): one input each, drawn with a probability proportional to its
        loss squared; as unit vector it is the new decoder row; rescaled to 0.2 of the alive features' mean encoder norm
        it is the new encoder column; encoder bias 0; Adam's moments of just these entries 0.

        dead: bool (n_features,); x: (N, d_in) raw, a random sample; -> how many were resampled
        """
        n_dead = int(dead.sum())
        x = x[x.abs().amax(1) > 0]  # zeros have no direction
        if n_dead == 0 or len(x) == 0:
            return 0
        losses, norms = [], self.W_dec.norm(dim=1) if self.recipe == "scaling" else 1.0
        for chunk in x.split(4096):
            f, scaled = self.encode(chunk), chunk.to(self.W_dec) * self.input_scale(chunk)
            losses.append((f @ self.W_dec + self.b_dec - scaled).square().sum(1) + l1_coeff * (f * norms).sum(1))
        losses = torch.cat(losses).cpu().double()
        odds = (losses / losses.max().clamp_min(1e-300)).square() + 1e-12  # so that a perfect autoencoder can draw, too
        picked = torch.multinomial(odds, n_dead, replacement=n_dead > len(odds), generator=generator)
        picked = x[picked.to(x.device)].to(self.W_dec)
        rows = F.normalize(picked * self.input_scale(picked), dim=1)               # (n_dead, n), unit norm
        alive_norm = self.W_enc[:, ~dead].norm(dim=0).mean() if n_dead < self.n_features else 1.0
        self.W_dec[dead] = rows
        self.b_enc[dead] = 0.0
        if self.recipe != "tied":
            self.W_enc[:, dead] = 0.2 * alive_norm * rows.t()
        for p, feature_dim in ((self.W_enc, 1), (self.b_enc, 0), (self.W_dec, 0)):  # a tied W_enc has no moments
            for name in ("exp_avg", "exp_avg_sq"):
                if name in optimizer.state.get(p, {}):
                    optimizer.state[p][name].transpose(0, feature_dim)[dead] = 0.0
        return n_dead

    @torch.no_grad()
    def fold(self):
        """
        -> an autoencoder of the form ReLU(x W_enc + b_enc) W_dec + b_dec that reconstructs every x as this one does,
        with unit decoder rows, scale 1, no pre-encoder bias: f_i is the activation f_i ||W_dec_i|| of Templeton et al.
        and W_dec_i the direction. (With input_norm="token" each vector's own scale stays.)
        """
        scale = 1.0 if self.input_norm == "token" else self.scale
        norms = self.W_dec.norm(dim=1)
        bias = self.b_enc - self.b_dec @ self.W_enc if self.pre_bias else self.b_enc
        folded = SparseAutoencoder(self.d_in, self.n_features, "scaling", self.input_norm).to(self.W_dec)
        folded.W_enc.copy_(self.W_enc * norms)
        folded.b_enc.copy_(bias * norms / scale)
        folded.W_dec.copy_(self.W_dec / norms.clamp_min(1e-12)[:, None])
        folded.b_dec.copy_(self.b_dec / scale)
        if self.input_norm == "token":
            folded.scale.copy_(self.scale)
        return folded


def geometric_median(x, n_iters=100, tolerance=1e-6):
    """x (N, n) -> the point (n,) with the smallest sum of distances to all rows (Weiszfeld's iteration)."""
    median = x.mean(0)
    for _ in range(n_iters):
        weights = 1 / (x - median).norm(dim=1).clamp_min(1e-8)
        previous, median = median, (weights @ x) / weights.sum()
        if (median - previous).norm() <= tolerance * median.norm():
            break
    return median


# -----------------------------------------------------------------------------
# schedules: what changes from step to step, as functions of the step alone

def l1_at(step, max_iters, l1_coeff, recipe):
    """lambda at a step: scaling raises it linearly from 0 over the first 5% of the steps."""
    return l1_coeff * min(1.0, step / (0.05 * max_iters)) if recipe == "scaling" else l1_coeff


def lr_at(step, max_iters, learning_rate, recipe):
    """Adam's rate at a step: scaling lowers it linearly over the last 20% of the steps, to reach 0 after the last."""
    return learning_rate * min(1.0, (max_iters - step) / (0.2 * max_iters)) if recipe == "scaling" else learning_rate


def resample_schedule(max_iters):
    """
    -> steps after which towards resamples, and for how many steps before a feature must have been silent to count as
    dead: 25,000 to 100,000 and 12,500 as in the paper; runs of fewer than 200,000 steps scale both with their length.
    """
    length = min(max_iters, 200_000)
    return [max(1, length * k // 8) for k in (1, 2, 3, 4)], max(1, length // 16)


# -----------------------------------------------------------------------------
# activations on disk

class ActivationStore:
    """
    Rows of one or more .npy files (float16, 32 or 64, all of one width) as an endless shuffled stream. A row's place is
    a function of (seed, epoch): an epoch visits every row once, and `batch(position, n)` needs no state to go on from.

    Files are cut into slices of at most 128 MiB; an epoch takes the slices in random order and shuffles the rows inside
    each, so memory stays at one slice, two where a batch reaches into the next. Files of train_sae.py are shuffled
    already. part: the share of all rows to use, as (from, to). UserError for what is no such file, and for NaN or
    infinity in the rows.
    """
    SLICE_BYTES = 128 * 2**20
    loaded = None, None  # (which slice, its rows shuffled): the one in memory

    def __init__(self, paths, seed=0, part=(0.0, 1.0)):
        files = [(path, *(rows := open_npy(path)).shape, rows.itemsize) for path in paths]
        self.width, self.seed = files[0][2], seed
        total, before = sum(n for _, n, _, _ in files), 0
        first, last = int(part[0] * total), int(part[1] * total)
        self.slices = []  # (path, first row, last row + 1)
        for path, n, width, itemsize in files:
            if width != self.width:
                raise UserError(f"{path} has rows of width {width}, {files[0][0]} of {self.width}: "
                                "give files of one width")
            start, stop = max(first - before, 0), min(last - before, n)
            step = max(1, self.SLICE_BYTES // (width * itemsize))
            self.slices += [(path, i, min(i + step, stop)) for i in range(start, stop, step)]
            before += n
        self.sizes = np.array([stop - start for _, start, stop in self.slices], dtype=np.int64)
        self.rows = int(self.sizes.sum())
        if self.rows == 0:
            raise UserError(f"{files[0][0]}: {total} rows are too few to train on some and hold out others")

    def read(self, i, pick):
        """Rows `pick` (indices) of slice i, in memory."""
        path, start, stop = self.slices[i]
        rows = np.load(path, mmap_mode="r", allow_pickle=False)[start:stop][pick]
        rows = rows.astype(np.float32) if rows.dtype == np.float64 else rows
        if not np.isfinite(rows).all():
            raise UserError(f"{path} holds NaN or infinity in rows {start:,} to {stop:,}: mend it or leave it out")
        return rows

    def batch(self, position, n):
        """Rows position .. position + n of the stream -> float tensor (n, width)."""
        parts = []
        while n > 0:
            parts.append(self.rows_from(position)[:n])
            position += len(parts[-1])
            n -= len(parts[-1])
        return torch.cat(parts).float()

    def rows_from(self, position):
        """The rest of the slice that row `position` of the stream is in; it is kept in memory for the next batch."""
        epoch, offset = divmod(position, self.rows)
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.slices))
        ends = np.cumsum(self.sizes[order])
        k = int(np.searchsorted(ends, offset, side="right"))
        i, offset = int(order[k]), offset - int(ends[k] - self.sizes[order[k]])
        if self.loaded[0] != (epoch, i):
            self.loaded = None, None  # frees the last slice before the next comes
            shuffled = np.random.default_rng((self.seed, epoch, i)).permutation(self.sizes[i])
            self.loaded = (epoch, i), torch.from_numpy(self.read(i, shuffled))
        return self.loaded[1][offset:]

    def sample(self, n, seed):
        """n rows drawn evenly from all of them, without repetition -> tensor (n, width) in the files' own precision."""
        rng = np.random.default_rng(seed)
        shares = np.cumsum(self.sizes) * min(n, self.rows) / self.rows
        counts = np.diff(np.floor(shares + rng.random()).astype(np.int64), prepend=0)  # each slice gives its share
        parts = [self.read(i, np.sort(rng.choice(self.sizes[i], count, replace=False)))
                 for i, count in enumerate(counts) if count]
        return torch.from_numpy(np.concatenate(parts))


class ActivationStream(ActivationStore):
    """
    Activations that are made when they are needed and never written: ActivationStore's batch and sample without an end.
    make(n, key) -> (n, width), decided by key; batch takes them by shards of SHARD_ROWS, of which one is kept.
    """

    def __init__(self, make, width, seed):
        self.make, self.width, self.seed, self.rows = make, width, seed, math.inf

    def rows_from(self, position):
        number, offset = divmod(position, SHARD_ROWS)
        if self.loaded[0] != number:
            self.loaded = None, None
            self.loaded = number, self.make(SHARD_ROWS, (self.seed, number))
        return self.loaded[1][offset:]

    def sample(self, n, seed):
        return self.make(n, seed)


def open_npy(path):
    """-> memory-mapped array (rows, width) of floats; UserError for anything else. Never unpickles."""
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path} not found")
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{path} is truncated, holds Python objects or is no .npy file ({error})")
    floats = (np.float16, np.float32, np.float64)
    if not isinstance(rows, np.ndarray) or rows.ndim != 2 or 0 in rows.shape or rows.dtype not in floats:
        found = f"{rows.dtype} of shape {rows.shape}" if isinstance(rows, np.ndarray) else "an archive"
        raise UserError(f"{path} holds {found}: give floats (float16, 32 or 64) of shape (rows, width)")
    return rows


# -----------------------------------------------------------------------------
# on disk

def save_sae(path, sae, **extra):
    """Writes sae and any extra tensors and plain values, moved into place when complete."""
    save_checkpoint(path, weights=sae.state_dict(), scale=sae.scale.item(), d_in=sae.d_in, n_features=sae.n_features,
                    recipe=sae.recipe, input_norm=sae.input_norm, pre_bias=sae.pre_bias, **extra)


def load_sae(path, device="cpu"):
    """-> SparseAutoencoder as save_sae wrote it; its attribute `extra` holds the extra values."""
    hint = "run python train_sae.py first"
    settings = ("weights", "scale", "d_in", "n_features", "recipe", "input_norm", "pre_bias")
    with reading(path, hint):
        checkpoint = load_checkpoint(path, device)
        sae = SparseAutoencoder(**{name: checkpoint[name] for name in settings[2:]}).to(device)
        sae.load_state_dict(checkpoint["weights"])
        sae.scale.fill_(checkpoint["scale"])
    sae.extra = {name: value for name, value in checkpoint.items() if name not in settings}
    return sae
