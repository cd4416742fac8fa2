"""
The sparse autoencoder: what the papers differ in, the autoencoder itself, and the activations
it is trained on.

    Cunningham et al. 2023, "Sparse Autoencoders Find Highly Interpretable Features in Language
        Models" (arXiv 2309.08600): the recipe "tied"
    Bricken et al. 2023, "Towards Monosemanticity"
        (transformer-circuits.pub/2023/monosemantic-features): the recipe "towards"
    Templeton et al. 2024, "Scaling Monosemanticity"
        (transformer-circuits.pub/2024/scaling-monosemanticity): the recipe "scaling"

An activation vector x of width n becomes m feature activations f, most of them 0, and back:

    f = activation(x W_enc + b_enc)                 (m,)  what the features read
    x_hat = f W_dec + b_dec                         (n,)  what they write, added up
    loss = ||x - x_hat||^2 + lambda sum_i f_i w_i         averaged over the batch

Column i of W_enc is what feature i looks for, row i of W_dec is its direction. Both terms of the
loss are sums over their axis (the width, the features) and means over the batch, so that lambda
depends neither on the size of the batch nor on the number of features. It does depend on the
width: inputs are scaled until the mean of ||x||^2 is the width, so the same data in four times the
width takes twice the lambda.

Notable:
- the table RECIPES is the comparison of the papers; a new recipe is a new row
- fold() brings every recipe into one form, unit rows and raw units, for all that comes after
- names and shapes of the weights are those of SAELens
- on a CPU the step is several times faster than the equations written down as they are, and as
  exact; a first reader may skip how (SparseStep, at the end)
"""
import glob
import math
import os
import warnings
from dataclasses import asdict, dataclass, replace
from typing import Callable

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from model import (Progress, UserError, content_hash, load_checkpoint, reading, save_checkpoint,
                   to_device)

# -----------------------------------------------------------------------------
# what the papers differ in


@dataclass(frozen=True)
class Recipe:
    """One way to build and train a sparse autoencoder; the comments say who states what, where."""
    paper: str

    # f = activation(z), from z (..., n_features) to f of the same shape, 0 or more. All three
    # papers: ReLU.
    activation: Callable = F.relu

    # One matrix: W_enc is W_dec^T, and there is no b_dec (Cunningham et al., section 2).
    tied: bool = False

    # b_dec is subtracted from x before x is encoded: (x - b_dec) W_enc + b_enc (Bricken et al.,
    # "Sparse Autoencoder Setup").
    pre_bias: bool = False

    # "transposed": rows of W_dec in random directions, W_enc = W_dec^T (Circuits Updates, April
    # 2024). "kaiming": encoder and decoder apart, each as PyTorch starts a linear layer, entries
    # uniform in +-1 / sqrt(fan_in) (Bricken et al., appendix on the autoencoder's training); the
    # rows of W_dec are then brought to the norm that they start at.
    start: str = "transposed"

    # b_dec starts at the geometric median of the data, not at 0 (Bricken et al., appendix on the
    # autoencoder's training). All other biases start at 0 everywhere.
    median_start: bool = False

    # Activation i counts w_i = ||W_dec_i|| times in the penalty, otherwise once. Small
    # activations of long rows then gain nothing, and the rows may have any norm (Templeton et
    # al., "Sparse Autoencoders").
    norms_in_penalty: bool = False

    # The penalty is the sum of penalty(f_i w_i); None: of f_i w_i itself, the L1 norm of all
    # three papers. Where f is 0 its slope must be finite: torch.sqrt will not do. Nor will a
    # count, whose slope is 0 everywhere. train_sae.py finds both out before the first step.
    penalty: Callable | None = None

    # Each row of W_dec is brought back to unit norm after every step (Cunningham et al.,
    # section 2; Bricken et al., "Sparse Autoencoder Setup").
    unit_rows: bool = False

    # Before every step the part of the gradient that is parallel to its row is removed, or
    # Adam would see a pull that unit_rows undoes (Bricken et al., appendix on the
    # autoencoder's training).
    project_gradient: bool = False

    # The steps after which dead features get a new start, and for how many steps before that
    # a feature must have been silent to count as dead (Bricken et al., appendix on neuron
    # resampling). A run of less than twice the last of them takes others: see resample_schedule.
    resample_steps: tuple[int, ...] = ()
    dead_steps: int = 12_500

    # lambda rises linearly from 0 over this share of the steps, the first ones (Circuits Updates,
    # April 2024; Templeton et al., "Sparse Autoencoders").
    l1_warmup: float = 0.0

    # Adam's rate falls linearly to 0 over this share of the steps, the last ones (the same).
    lr_decay: float = 0.0

    # The norm of the gradient is at most this; 0: it may have any (the same).
    clip: float = 0.0

    def __post_init__(self):
        if self.tied and (self.pre_bias or self.median_start):
            raise ValueError("a recipe with tied weights has no b_dec to subtract or to start")
        if self.project_gradient and not self.unit_rows:
            raise ValueError("the projection is for rows of unit norm: set unit_rows as well")


RECIPES = {
    "scaling": Recipe(
        "Templeton et al. 2024, Scaling Monosemanticity",
        norms_in_penalty=True,
        l1_warmup=0.05,
        lr_decay=0.2,
        clip=1.0,
    ),
    "towards": Recipe(
        "Bricken et al. 2023, Towards Monosemanticity",
        pre_bias=True,
        start="kaiming",
        median_start=True,
        unit_rows=True,
        project_gradient=True,
        resample_steps=(25_000, 50_000, 75_000, 100_000),
    ),
    "tied": Recipe(
        "Cunningham et al. 2023, Sparse Autoencoders Find Highly Interpretable Features",
        tied=True,
        unit_rows=True,
    ),
}


STARTS = ("transposed", "kaiming")


@dataclass
class SAEConfig:
    """What one autoencoder is made from. It is saved and restored as a whole."""
    d_in: int                     # width of the activations
    n_features: int               # size of the dictionary
    recipe: str = "scaling"       # a row of RECIPES
    input_norm: str = "dataset"   # what brings ||x||^2 to d_in: dataset, token or none
    center: bool = False          # whether the data's mean is taken off first (no paper does)
    decoder_norm: float = 0.15    # norm of W_dec's rows at the start, unless unit_rows says 1
    pre_bias: bool | None = None  # None: as the recipe has it; False after fold()
    tied: bool | None = None      # the same
    start: str | None = None      # None: as the recipe has it

    def __post_init__(self):
        check_known(self.recipe, RECIPES)
        check_known(self.input_norm, ("dataset", "token", "none"))
        if self.pre_bias is None:
            self.pre_bias = RECIPES[self.recipe].pre_bias
        if self.tied is None:
            self.tied = RECIPES[self.recipe].tied
        if self.start is None:
            self.start = RECIPES[self.recipe].start
        check_known(self.start, STARTS)


def check_known(value, known):
    """UserError unless value is one of the known ones."""
    if value not in known:
        raise UserError(f"{value} is unknown: it must be one of {', '.join(known)}")


# -----------------------------------------------------------------------------
# the autoencoder


class SparseAutoencoder(nn.Module):
    """
    W_enc (d_in, n_features), b_enc (n_features,), W_dec (n_features, d_in), b_dec (d_in,).

    `scale` (a scalar, 1 until fit_to) takes raw activations to the units in which the loss is
    measured; with center, `mean` (d_in,), 0 until fit_to, is taken off before. `extra` holds
    what was saved beside the autoencoder, see load_sae.

    Initialisation: see Recipe.start, with rows of W_dec of unit norm or of decoder_norm; biases 0.
    Circuits Updates, April 2024, suggests norms of 0.05 to 1. With 0.15 the fewest features die in
    short runs: of `scaling` on the default activations 0.4 % are dead after 250 steps, 3.9 % with
    0.05, 3.7 % with 0.3 and 37 % with 1.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.recipe = RECIPES[config.recipe]
        self.extra = {}

        if config.start == "kaiming":
            directions = uniform(config.n_features, config.d_in, bound=config.n_features**-0.5)
        else:
            directions = torch.randn(config.n_features, config.d_in)
        norm = 1.0 if self.recipe.unit_rows else config.decoder_norm
        self.W_dec = nn.Parameter(F.normalize(directions, dim=1) * norm)
        self.b_enc = nn.Parameter(torch.zeros(config.n_features))
        if config.tied:
            self.register_buffer("b_dec", torch.zeros(config.d_in), persistent=False)
        else:
            # Ugly: self.W_enc = ... is what one would write, but nn.Module refuses a parameter
            # whose name is a property of the class, as W_enc is below. It is kept transposed,
            # each feature's weights side by side: in that layout SparseStep makes its gradient.
            rows = self.W_dec.detach().clone()
            if config.start == "kaiming":
                rows = uniform(config.n_features, config.d_in, bound=config.d_in**-0.5)
            self._parameters["W_enc"] = nn.Parameter(rows.t())
            self.b_dec = nn.Parameter(torch.zeros(config.d_in))

        # not persistent: save_sae writes them beside the weights, which stay SAELens' four
        self.register_buffer("scale", torch.tensor(1.0), persistent=False)
        self.register_buffer("mean", torch.zeros(config.d_in), persistent=False)

    @property
    def W_enc(self):
        """(d_in, n_features). With tied weights it is the decoder, transposed."""
        return self.W_dec.t() if self.config.tied else self._parameters["W_enc"]

    # ---- the equations

    def centred(self, x):
        """Raw x (..., d_in) less the mean, with center; without, x itself."""
        return x.to(self.mean) - self.mean if self.config.center else x

    def input_scale(self, x):
        """
        For raw x (..., d_in), what `centred` x is multiplied by -> (..., 1).

        "dataset": one scalar for all vectors, so that E||x||^2 = d_in (Templeton et al.,
        "Sparse Autoencoders"). "token": each vector its own, so that ||x||^2 = d_in (the wording
        of Circuits Updates, February 2024). "none": 1.
        """
        if self.config.input_norm == "token":
            norms = self.centred(x).float().norm(dim=-1, keepdim=True)
            return math.sqrt(self.config.d_in) / norms.clamp_min(1e-30)  # zeros stay zeros
        return self.scale.expand(*x.shape[:-1], 1)

    def scaled(self, x):
        """Raw x (..., d_in) in the units of the loss and in the precision of the weights."""
        return self.centred(x.to(self.W_dec.dtype)) * self.input_scale(x)

    def pre_activations(self, x, features=None):
        """
        Scaled x (..., d_in) -> z (..., n_features), or of some features only: see encode.

        z = (x - b_dec) W_enc + b_enc, without pre_bias x W_enc + b_enc. The two methods below are
        this equation, arranged so that the gradient of b_dec costs little.
        """
        x = self.encoder_input(x)
        if features is None:
            # F.linear rounds to bfloat16 once, when the bias is added: what is near 0 moves little
            if torch.is_autocast_enabled(x.device.type):
                return F.linear(x, self.W_enc.t(), self.encoder_bias())
            return x @ self.W_enc + self.encoder_bias()
        rows = self.W_enc.t()[features]        # (k, d_in) or (B, k, d_in)
        b_enc = self.encoder_bias()[features]  # (k,) or (B, k)
        if features.dim() == 1:
            return F.linear(x, rows, b_enc)
        return x @ rows.transpose(1, 2) + b_enc[:, None]  # (B, T, k)

    def encoder_input(self, x):
        """Scaled x (..., d_in) -> what W_enc is applied to, as a constant: see encoder_bias."""
        return x - self.b_dec.detach() if self.config.pre_bias else x

    def encoder_bias(self):
        """
        b_enc (n_features,). With pre_bias the gradient of b_dec comes through it, which takes a
        product with a vector; through encoder_input it would take one more product of matrices.
        """
        if not self.config.pre_bias:
            return self.b_enc
        zero = self.b_dec - self.b_dec.detach()  # 0, with the gradient of b_dec
        return self.b_enc - zero @ self.W_enc.detach()

    def activation(self, z):
        """z (..., n_features) -> f, in training and, by way of encode, in every analysis."""
        return self.recipe.activation(z)

    @property
    @torch.no_grad()
    def is_relu(self):
        """
        Whether the activation function is ReLU, which allows two short cuts: SparseStep, and to
        encode some features alone. It is tried out rather than declared, so that nobody who
        changes it has to think of them. A function that keeps something of the batches it sees
        should do so only where torch.is_grad_enabled(): not here, nor in an analysis.

        With weights beside the usual four nothing counts as ReLU: a gain to be learned may be 1 at
        the start, and SparseStep would leave it there.
        """
        if not dict(self.named_parameters()).keys() <= {"W_enc", "b_enc", "W_dec", "b_dec"}:
            return False
        z = torch.linspace(-1, 1, self.config.n_features).to(self.W_dec)
        z = torch.stack([z, z.abs()])  # also where all are positive: topk would drop some
        sizes = 10.0 ** torch.arange(-4, 5, device=z.device)
        z = sizes[:, None, None] * z  # small enough for a threshold, large enough for a cap
        return torch.equal(self.activation(z), F.relu(z))

    def encode(self, x, features=None):
        """
        x (..., d_in) raw activations -> f (..., n_features).

        features: only these, a list of k or (k,) -> f (..., k); or others for each context, (B,
        k) and x (B, T, d_in) -> f (B, T, k). All that looks at a feature's activations comes
        here, so that what is measured is what was trained.
        """
        x = self.scaled(x)
        if features is None:
            return self.activation(self.pre_activations(x))
        features = torch.as_tensor(features, dtype=torch.long, device=x.device)
        if self.is_relu:  # f_i depends on z_i alone: the others need not be computed
            return self.activation(self.pre_activations(x, features))
        f = self.activation(self.pre_activations(x))
        if features.dim() == 1:
            return f[..., features]
        return f.take_along_dim(features[:, None], dim=-1)

    def decode(self, f, scale=None):
        """
        f (..., n_features) -> x_hat (..., d_in) in raw units.

        scale: input_scale(x) of the x that was encoded; only input_norm="token" needs it.
        """
        if scale is None:
            scale = self.scale
        x_hat = (f @ self.W_dec + self.b_dec) / scale
        return x_hat + self.mean if self.config.center else x_hat

    def forward(self, x):
        """x (..., d_in) raw activations -> their reconstruction x_hat (..., d_in), raw as well."""
        return self.decode(self.encode(x), self.input_scale(x))

    def penalty_weights(self):
        """What activations count in the penalty: the norms of W_dec's rows (n_features,), or 1."""
        return self.W_dec.norm(dim=1) if self.recipe.norms_in_penalty else 1.0

    def loss(self, x, l1_coeff, sparse=None):
        """
        The mean over the batch of ||x - x_hat||^2 + lambda sum_i f_i w_i, in scaled units.

        x: (N, d_in) raw activations. l1_coeff: lambda. sparse: see reconstruct.
        Returns the loss (scalar) and stats, a dict: mse and l1, the two terms without lambda; l0,
        the number of active features a vector; fired, bool (n_features,), those active on any.
        Whoever adds a term leaves mse as it is, since the log's variance explained comes from
        it; a scalar in stats, by any other name, goes into log.jsonl.
        """
        x = self.scaled(x)
        w = self.penalty_weights()
        x_hat, f, f_sum, n_active = self.reconstruct(x, sparse)

        # sums over the width and over the features, means over the batch
        mse = F.mse_loss(x_hat, x, reduction="sum") / len(x)
        if self.recipe.penalty is None:
            l1 = (f_sum * w).sum() / len(x)
        else:
            l1 = self.recipe.penalty(f * w).sum(dtype=self.W_dec.dtype) / len(x)
        stats = {
            "mse": mse.detach(),
            "l1": l1.detach(),
            "l0": n_active / len(x),
            "fired": f_sum.detach() > 0,
        }
        return mse + l1_coeff * l1, stats

    def reconstruct(self, x, sparse=None):
        """
        What the loss needs to know of scaled x (N, d_in).

        sparse: True and False force the exact sparse and the dense step, which give the same
        numbers; None takes the sparse one where that is exact, and faster.
        Returns x_hat (N, d_in); f (N, n_features), but None from the sparse step, which never has
        it as a whole; f summed over the batch (n_features,); how many entries of f are over 0.
        """
        if sparse is None:
            sparse = self.sparse_pays(x)
        elif sparse and not self.sparse_is_exact:
            raise ValueError("the sparse step is for ReLU and the L1 penalty alone")
        if sparse:
            weights = (self.W_enc, self.encoder_bias(), self.W_dec, self.b_dec)
            x_hat, f_sum, n_active = SparseStep.apply(self.encoder_input(x), *weights)
            return x_hat, None, f_sum, n_active
        f = self.activation(self.pre_activations(x))  # (N, n_features)
        x_hat = f @ self.W_dec + self.b_dec           # (N, d_in)
        f_sum = f.sum(0, dtype=self.W_dec.dtype)      # of bfloat16, a sum would lose too much
        return x_hat, f, f_sum, (f > 0).sum()

    @property
    def sparse_is_exact(self):
        """Whether SparseStep computes what this recipe says."""
        return self.recipe.penalty is None and self.is_relu

    def sparse_runs(self, x):
        """Whether the sparse step runs here, on x, and is exact."""
        # in this order: torch.compile cannot look into the last two
        if x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return False
        return torch.backends.mkl.is_available() and self.sparse_is_exact

    @torch.no_grad()
    def sparse_pays(self, x):
        """
        Whether the sparse step runs here, is exact, and pays: fewer than one entry in ten is
        active in the first 64 vectors of scaled x (N, d_in).
        """
        if not self.sparse_runs(x):
            return False
        f = self.activation(self.pre_activations(x[:64]))
        return (f > 0).float().mean().item() < 0.1

    # ---- what some recipes do around a step of Adam

    @torch.no_grad()
    def remove_parallel_gradient(self):
        """Before the step, where the recipe projects: W_dec.grad less its part along each row."""
        if self.recipe.project_gradient:
            along = (self.W_dec.grad * self.W_dec).sum(1, keepdim=True)  # (n_features, 1)
            self.W_dec.grad -= along * self.W_dec

    @torch.no_grad()
    def normalize_decoder(self):
        """After the step, for recipes with unit rows: every row of W_dec back to L2 norm 1."""
        if self.recipe.unit_rows:
            self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)

    # ---- the start, and new starts

    @torch.no_grad()
    def fit_to(self, x):
        """The starting point from a sample x (N, d_in), raw: the mean, the scale and b_dec."""
        x = x.float()
        if self.config.center:
            self.mean.copy_(where_float64_is(x).mean(0, dtype=torch.float64))
        if self.config.input_norm != "none":
            centred = self.centred(x)
            # squares of 1e20 would overflow, those of 1e-20 vanish: x is taken in units of its
            # largest entry, or rather of a power of two near it, as dividing by that is exact
            unit = 2.0 ** (math.frexp(centred.abs().max().item())[1] - 1)
            squares = (centred / unit).square().sum(1)
            mean_square = squares.mean().clamp_min(1e-30).item()  # E||x||^2
            self.scale.fill_(math.sqrt(self.config.d_in / mean_square) / unit)
        if self.recipe.median_start:
            self.b_dec.copy_(geometric_median(self.scaled(x)))

    @torch.no_grad()
    def losses(self, x, l1_coeff):
        """
        The loss of each of x (N, d_in), raw activations -> (N,). No gradients. This is `loss` once
        more, vector by vector, for `resample`: a term that is added there belongs here, too.
        """
        losses = []
        for chunk in x.split(4096):
            f = self.encode(chunk)
            errors = (f @ self.W_dec + self.b_dec - self.scaled(chunk)).square().sum(1)
            penalties = f * self.penalty_weights()  # (N, n_features)
            if self.recipe.penalty is not None:
                penalties = self.recipe.penalty(penalties)
            losses.append(errors + l1_coeff * penalties.sum(1))
        return torch.cat(losses)

    @torch.no_grad()
    def resample(self, dead, x, optimizer, l1_coeff, generator=None):
        """
        Gives every dead feature a new start at an input that is badly reconstructed now
        (Bricken et al., appendix on neuron resampling).

        dead: bool (n_features,). x: (N, d_in) raw, a random sample. optimizer: the Adam that
        trains this. -> how many features were resampled
        """
        n_dead = int(dead.sum())
        x = x[self.has_direction(x)]
        if n_dead == 0 or len(x) == 0:
            return 0

        # one input for each dead feature, drawn with a probability proportional to its loss
        # squared
        losses = self.losses(x, l1_coeff).cpu().double()
        odds = (losses / losses.max().clamp_min(1e-300)).square()
        odds += 1e-12  # so that a perfect autoencoder can draw, too
        too_few = n_dead > len(odds)
        drawn = torch.multinomial(odds, n_dead, replacement=too_few, generator=generator)
        # The text does not say whether b_dec is taken off an input first. Here it is where the
        # encoder takes it off: features add up to x_hat - b_dec, and so point there.
        inputs = self.encoder_input(self.scaled(x[drawn.to(x.device)]))  # (n_dead, d_in)
        rows = F.normalize(inputs, dim=1)                                # (n_dead, d_in)

        # the decoder row is that input at unit norm; the encoder column is the row at 0.2 of the
        # alive features' mean encoder norm, so that the newcomer disturbs little; the bias is 0
        some_alive = n_dead < self.config.n_features
        alive_norm = self.W_enc[:, ~dead].norm(dim=0).mean() if some_alive else 1.0
        self.W_dec[dead] = rows
        if self.config.tied:
            # the column is the row, which has no free length: the bias makes the newcomer just
            # as quiet, at 0.2 ||x|| on its own input x and silent where little is like it
            self.b_enc[dead] = -0.8 * inputs.norm(dim=1)
        else:
            self.b_enc[dead] = 0.0
            self.W_enc[:, dead] = 0.2 * alive_norm * rows.t()
        self.forget_moments(dead, optimizer)
        return n_dead

    def has_direction(self, x):
        """Which of x (N, d_in), raw, are not 0 where the encoder reads them -> bool (N,)."""
        parts = []
        for chunk in x.split(4096):
            parts.append(self.encoder_input(self.scaled(chunk)).abs().amax(1) > 0)
        return torch.cat(parts)

    def forget_moments(self, dead, optimizer):
        """Adam's moments of dead features' entries become 0, or old gradients would move them."""
        feature_dims = {"W_enc": 1, "b_enc": 0, "W_dec": 0}
        for name, parameter in self.named_parameters():
            state = optimizer.state.get(parameter, {})
            for moment in ("exp_avg", "exp_avg_sq"):
                if name in feature_dims and moment in state:
                    state[moment].transpose(0, feature_dims[name])[dead] = 0.0

    # ---- one form for all that comes after

    @torch.no_grad()
    def fold(self):
        """
        Returns an autoencoder with the same reconstructions and the form activation(x W_enc +
        b_enc) W_dec + b_dec: unit decoder rows, scale 1, no tied weights, no pre-encoder
        bias. Its f_i is the activation f_i ||W_dec_i|| of Templeton et al. ("Sparse
        Autoencoders") in raw units, its W_dec_i the direction. The mean that was taken off goes
        into both biases. With input_norm="token" each vector's own scale stays, and the mean: f
        is then in that scale and not in raw units.
        """
        own_scales = self.config.input_norm == "token"
        center = self.config.center and own_scales
        config = replace(self.config, tied=False, pre_bias=False, center=center)
        folded = SparseAutoencoder(config).to(self.W_dec)
        folded.extra = self.extra

        b_enc, b_dec = self.b_enc, self.b_dec
        if self.config.pre_bias:
            b_enc = b_enc - b_dec @ self.W_enc  # as (x - b) W = x W - b W
        if own_scales:
            scale = 1.0
            folded.scale.copy_(self.scale)
            folded.mean.copy_(self.mean)
        else:
            scale = self.scale
            b_enc = b_enc - scale * self.mean @ self.W_enc  # the same once more
            b_dec = b_dec / scale + self.mean
        norms = self.W_dec.norm(dim=1)
        folded.W_enc.copy_(self.W_enc * norms)
        folded.b_enc.copy_(b_enc * norms / scale)
        folded.W_dec.copy_(self.W_dec / norms.clamp_min(1e-12)[:, None])
        folded.b_dec.copy_(b_dec)

        # z is now `gain` times what it was, and so is ReLU(z); another function has to be asked
        # at the old z
        if not self.is_relu:
            gain = norms.clamp_min(1e-12) / scale
            folded.activation = lambda z: gain * self.activation(z / gain)
        return folded


def uniform(*shape, bound):
    """A tensor of a shape, its entries uniform in +-bound."""
    return torch.empty(shape).uniform_(-bound, bound)


def geometric_median(x, n_iters=100, tolerance=1e-6):
    """
    x (N, n) -> the point (n,) with the smallest sum of distances to all rows, by Weiszfeld's
    iteration.
    """
    median = x.mean(0)
    for _ in range(n_iters):
        weights = 1 / (x - median).norm(dim=1).clamp_min(1e-8)  # near rows pull more
        previous = median
        median = (weights @ x) / weights.sum()
        if (median - previous).norm() <= tolerance * median.norm():
            break
    return median


# -----------------------------------------------------------------------------
# what rows of activations are like, and how much of their variance is explained


def where_float64_is(x):
    """x where it is, or on the CPU if its device has no float64: Apple's GPUs have none."""
    return x.cpu() if x.device.type == "mps" else x


def all_finite(x):
    """Whether no entry of a tensor x is NaN or infinite."""
    low, high = x.aminmax()  # NaN is both; isfinite takes forty times as long for float16 on a CPU
    return low.isfinite() & high.isfinite()


def squared_norms(x):
    """||x||^2 of each row of x (N, n) -> (N,), in float64."""
    # in pieces, of which float64 makes copies
    norms = [where_float64_is(part).norm(dim=1, dtype=torch.float64) for part in x.split(8192)]
    return torch.cat(norms).square()


def mean_share(x):
    """The share of E||x||^2 that the mean of rows x (N, n) holds: ||E x||^2 / E||x||^2."""
    square = where_float64_is(x).mean(0, dtype=torch.float64).square().sum()
    return (square / squared_norms(x).mean()).item()


MASSIVE = 0.2  # a share of the squared norm that is much for the largest 1 % of the rows


def massive_share(x):
    """
    The share of E||x||^2 that the largest 1 % of rows x (N, n) hold. It is 1 % where all have
    one norm; in many language models the first token's is 50 times the others', and it holds
    nearly all ("massive activations", arXiv 2402.17762).
    """
    squares = squared_norms(x)
    largest = squares.topk(math.ceil(len(x) / 100)).values
    return (largest.sum() / squares.sum()).item()


def variance_of(x):
    """
    The sum of ||x - mean||^2 over the rows of x (N, n). In float64, and with a row taken off
    first: where the mean is large, little else would be left of the digits.
    """
    x = where_float64_is(x).double()
    x = x - x[0]  # so that what is constant is 0 to the last bit
    return (x - x.mean(0)).square().sum().item()


def explained_share(error, variance):
    """The share of a variance that is explained when an error is left. None: there is none."""
    return 1 - error / variance if variance > 0 else None


def show_explained(share):
    """What explained_share returned, as text."""
    return "undefined (no two rows differ)" if share is None else f"{share:.3f}"


# -----------------------------------------------------------------------------
# schedules: what changes from step to step, as functions of the step alone; units of lambda


def l1_at(step, max_iters, l1_coeff, recipe):
    """lambda at a step: it rises linearly from 0 over the first l1_warmup of the steps."""
    if not recipe.l1_warmup:
        return l1_coeff
    return l1_coeff * min(1.0, step / (recipe.l1_warmup * max_iters))


def lr_at(step, max_iters, learning_rate, recipe):
    """Adam's rate at a step: it falls linearly to 0 over the last lr_decay of the steps."""
    if not recipe.lr_decay:
        return learning_rate
    return learning_rate * min(1.0, (max_iters - step) / (recipe.lr_decay * max_iters))


def resample_schedule(max_iters, recipe):
    """
    Returns the steps after which dead features are resampled, a list, and for how many steps a
    feature must have been silent to count as dead, which the log of any recipe says, too. Both are
    the recipe's own in a run at least twice as long as the last of its steps: with the paper's
    steps, from 200,000 on.

    A shorter run cannot copy them: features die in its first half and newcomers need time to
    settle. It resamples after 4, 5, ... 9 tenths of its steps, looking back a tenth. Of the
    features of `towards`, trained for 1,500 steps on the default activations (2,048, lambda 3),
    so many were then dead on held-out tokens:

        no resampling                                        49 %
        the paper's steps and window, scaled to the run      35 %
        4 to 9 tenths, looking back a tenth                   3 %    variance explained 0.833
        the same, a fiftieth                                  1 %                       0.828
        5, 6.5 and 8 tenths, looking back 0.15               27 %
    """
    tenth = max(1, max_iters // 10)
    last = max(recipe.resample_steps, default=100_000)  # without any, the paper's last
    if max_iters >= 2 * last:
        return list(recipe.resample_steps), min(recipe.dead_steps, tenth)
    tenths = range(4, 10) if recipe.resample_steps else ()
    return [max(1, k * max_iters // 10) for k in tenths], tenth


def paper_lambda(l1_coeff, width, scale):
    """
    lambda in the units of Bricken et al., whose loss (appendix on the autoencoder's training) is
    the mean, not the sum, over the vector's elements of the squared error, and whose activations
    are raw. What is here s^2 |x - x_hat|^2 + lambda s |f|, divided by n s^2, is theirs.
    """
    return l1_coeff / (width * scale)


# -----------------------------------------------------------------------------
# autoencoders on disk


def save_sae(path, sae, **extra):
    """
    Writes sae and any extra tensors and plain values, moved into place when complete.
    ValueError for a folded autoencoder whose activation function, not ReLU, could not be
    restored.
    """
    if "activation" in vars(sae):
        raise ValueError("save the autoencoder itself: fold() has changed its activation")
    save_checkpoint(
        path,
        weights=sae.state_dict(),
        scale=sae.scale.item(),
        mean=sae.mean,
        config=asdict(sae.config),
        **extra,
    )


def restore_sae(sae, checkpoint):
    """Gives sae the weights and units of a checkpoint of save_sae, which are taken out of it."""
    sae.load_state_dict(checkpoint.pop("weights"))
    sae.scale.fill_(checkpoint.pop("scale"))
    sae.mean.copy_(checkpoint.pop("mean", sae.mean))  # files from before there was one hold none


def load_sae(path, device="cpu"):
    """
    Loads what save_sae wrote, in eval mode; the attribute `extra` of the SparseAutoencoder holds
    the extra.
    """
    if not os.path.exists(path):
        folder = os.path.dirname(os.path.dirname(path))
        found = glob.glob(os.path.join(glob.escape(folder), "*", "sae.pt"))
        others = sorted(os.path.basename(os.path.dirname(other)) for other in found)
        there = f" (there are {', '.join(others)})" if others else ""
        raise UserError(f"{path} not found: run python train_sae.py first{there}")
    with reading(path, "put a good one there, or move it away before you run train_sae.py"):
        checkpoint = load_checkpoint(path, device)
        sae = SparseAutoencoder(SAEConfig(**checkpoint.pop("config"))).to(device)
        restore_sae(sae, checkpoint)
    sae.extra = checkpoint
    return sae.eval()


# -----------------------------------------------------------------------------
# activations: rows on disk, or made as they are needed

# of somebody's own rows: files may have an order, so what is held out is one piece at the end,
# not a random part
TRAINED_ON = (0, 0.95)
HELD_OUT = (0.95, 1)
SHARD_ROWS = 2**17  # rows of activations that are made, shuffled and written at a time


class ActivationStore:
    """
    Rows of one or more .npy files (float16, 32 or 64, all of one width) as an endless
    shuffled stream. What has more than two dimensions is read as rows along the last.

    A row's place is a function of (seed, epoch): an epoch visits every row once, and
    batch(position, n) needs no state to go on from. Files are cut into slices of at most 128
    MiB; an epoch takes the slices in random order and shuffles the rows inside each, so that
    memory stays at one slice, two where a batch reaches into the next. Files of train_sae.py
    are shuffled already.

    part: the share of all rows to use, as (from, to). device: where batch leaves the rows, if
    that is a GPU; it shuffles them there. UserError for what is no such file, and for NaN or
    infinity in the rows.
    """
    SLICE_BYTES = 128 * 2**20
    # set here, since ActivationStream has an __init__ of its own
    loaded_slice = None  # (epoch, which slice) of the one that is in memory
    loaded_rows = None   # its rows, shuffled

    def __init__(self, paths, seed=0, part=(0.0, 1.0), device=torch.device("cpu")):
        self.seed = seed
        self.device = device
        arrays = [open_npy(path) for path in paths]
        self.width = arrays[0].shape[1]
        self.total = sum(len(rows) for rows in arrays)
        self.first = first = int(part[0] * self.total)
        last = int(part[1] * self.total)
        before = 0  # rows of the files before this one
        self.slices = []  # (path, first row, last row + 1)
        for path, rows in zip(paths, arrays):
            if rows.shape[1] != self.width:
                raise UserError(
                    f"{path} has rows of width {rows.shape[1]}, {paths[0]} of {self.width}: "
                    "give files of one width"
                )
            start = max(first - before, 0)
            stop = min(last - before, len(rows))
            step = max(1, self.SLICE_BYTES // (self.width * rows.itemsize))
            for i in range(start, stop, step):
                self.slices.append((path, i, min(i + step, stop)))
            before += len(rows)
        sizes = [stop - start for _, start, stop in self.slices]
        self.sizes = np.array(sizes, dtype=np.int64)
        self.rows = int(self.sizes.sum())
        if self.rows == 0:
            raise UserError(
                f"{paths[0]}: {self.total} rows are too few to train on some and hold out others"
            )

    def read(self, i, indices):
        """The rows `indices` of slice i, in memory."""
        rows = self.unchecked(i, indices)
        self.check(i, all_finite(torch.from_numpy(rows)))
        return rows

    def unchecked(self, i, indices=slice(None)):
        """The same, NaN and all. A whole slice stays mapped from the disk if nothing changes."""
        path, start, stop = self.slices[i]
        rows = open_npy(path)[start:stop][indices]
        small = np.float32 if rows.itemsize == 8 else rows.dtype.newbyteorder("=")
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinity
            return rows.astype(small, copy=False)  # of this machine's byte order, too

    def check(self, i, finite):
        """UserError unless the rows of slice i are finite."""
        path, start, stop = self.slices[i]
        if not finite:
            raise UserError(
                f"{path} holds NaN, infinity or more than float32 can hold in rows "
                f"{start:,} to {stop:,}: mend it or leave it out"
            )

    def batch(self, position, n, rank=0, ranks=1):
        """
        The rows position .. position + n of the stream -> float tensor (n, width). Of several
        ranks each gets its share, (n / ranks, width).
        """
        end = position + n
        first = position + rank * n // ranks
        last = position + (rank + 1) * n // ranks
        parts = []
        # through all n, not its share alone, so that all ranks change slices at the same step
        while position < end:
            rows = self.rows_from(position)[:end - position]
            parts.append(rows[max(0, first - position):max(0, last - position)])
            position += len(rows)
        return torch.cat(parts).float()

    def rows_from(self, position):
        """The rest of the slice that row `position` of the stream is in; it stays in memory."""
        key, offset = self.find(position)
        if self.loaded_slice != key:
            self.loaded_rows = None  # frees the last slice before the next comes
            self.loaded_rows = self.load(*key)
            self.loaded_slice = key
        return self.loaded_rows[offset:]

    def find(self, position):
        """Which slice row `position` of the stream is in, for `load`, and which of its rows."""
        epoch, offset = divmod(position, self.rows)
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.slices))
        ends = np.cumsum(self.sizes[order])
        k = int(np.searchsorted(ends, offset, side="right"))  # the k-th slice of this epoch
        i = int(order[k])
        offset -= int(ends[k] - self.sizes[i])  # rows of the slices before it
        return (epoch, i), offset

    def load(self, epoch, i):
        """The rows of slice i (n, width), shuffled as they are in this epoch."""
        shuffled = np.random.default_rng((self.seed, epoch, i)).permutation(self.sizes[i])
        if self.device.type != "cuda":
            return torch.from_numpy(self.read(i, shuffled))
        rows = to_device(self.unchecked(i), self.device)
        rows = rows[to_device(shuffled, self.device)]
        self.check(i, all_finite(rows))
        return rows

    def sample(self, n, seed):
        """n rows drawn evenly from all, none twice -> tensor (n, width) in the files' precision."""
        rng = np.random.default_rng(seed)
        # each slice gives its share: how many rows come from it and from those before
        shares = np.cumsum(self.sizes) * min(n, self.rows) / self.rows
        until = np.floor(shares + rng.random()).astype(np.int64)
        counts = np.diff(until, prepend=0)
        parts = []
        progress = Progress("reading a sample", len(counts), "slices")
        for i, count in enumerate(counts):
            if count:
                indices = rng.choice(self.sizes[i], count, replace=False)
                parts.append(self.read(i, np.sort(indices)))
            progress.show(i + 1)  # of some 100 GB it takes a while
        return torch.from_numpy(np.concatenate(parts))

    def spread(self, n):
        """Places of n rows, evenly spread, in the order of the files; of all if there are fewer."""
        n = min(n, self.rows)
        return np.arange(n) * self.rows // n

    def at(self, places):
        """The rows at ascending places (k,) -> tensor (k, width) in the files' precision."""
        parts = []
        end = 0
        for i, size in enumerate(self.sizes):
            start, end = end, end + size
            inside = places[(places >= start) & (places < end)]
            if len(inside):
                parts.append(self.read(i, inside - start))
        return torch.from_numpy(np.concatenate(parts))

    def file_and_row(self, place):
        """Where the row at a place lies: a path, and the row's index in that file."""
        ends = np.cumsum(self.sizes)
        i = int(np.searchsorted(ends, place, side="right"))
        path, start, _ = self.slices[i]
        return path, int(start + place - (ends[i] - self.sizes[i]))


class ActivationStream(ActivationStore):
    """
    Activations that are made when they are needed and never written: batch and sample without
    an end.

    make(start, n) -> (n, width), rows start .. start + n of an endless sequence. batch takes
    them by shards of shard_rows and keeps one.
    """

    def __init__(self, make, width, shard_rows=SHARD_ROWS):
        self.make = make
        self.width = width
        self.shard_rows = shard_rows
        self.rows = math.inf

    def find(self, position):
        number, offset = divmod(position, self.shard_rows)
        return (number,), offset

    def load(self, number):
        return self.make(number * self.shard_rows, self.shard_rows)

    def sample(self, n, seed):
        start = np.random.default_rng(seed).integers(2**40)
        return self.make(int(start), n)


def open_npy(path):
    """
    Maps a file of floats (..., width), of either byte order, as (rows, width); UserError for
    anything else. Never unpickles.
    """
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path} not found")
    except Exception as error:  # numpy refuses wrong headers in half a dozen ways
        reason = "is truncated, holds Python objects or is no .npy file"
        raise UserError(f"{path} {reason} ({error})")
    found = "an archive"
    if isinstance(rows, np.ndarray):
        floats = rows.dtype.kind == "f" and rows.itemsize <= 8
        if floats and rows.ndim >= 2 and rows.size > 0:
            return rows.reshape(-1, rows.shape[-1])
        found = f"{rows.dtype} of shape {rows.shape}"
        if rows.dtype == "V2":  # what numpy, which has no bfloat16, makes of it
            found += " (bfloat16? save it as float32)"
    expected = "floats (float16, 32 or 64) of shape (rows, width)"
    raise UserError(f"{path} holds {found}: give {expected}")


def matching_files(pattern):
    """The paths that match --acts, sorted: the order of somebody's own rows."""
    paths = sorted(filter(os.path.isfile, glob.glob(pattern, recursive=True)))
    if not paths:
        raise UserError(
            f"no file matches --acts={pattern}: "
            "give a quoted pattern of .npy files (to train_sae.py gpt or toy, too)"
        )
    return paths


def own_source(paths, folder):
    """
    What the autoencoder in a folder keeps of the files it is trained on: what they hold, which
    alone tells whether they are the same, and where they lie, for `find_files`.
    """
    contents = []
    both = []  # of each file the path relative to the folder and the absolute one
    for path in paths:
        contents.append(content_hash(path))
        real = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
        try:
            relative = os.path.relpath(real, os.path.realpath(folder))
        except ValueError:  # Windows has no way from one drive to another
            relative = real
        both.append([relative, os.path.abspath(path)])
    return {"site": "own", "contents": contents, "paths": both}


def find_files(source, folder):
    """
    The paths of the files of own_source, now that the autoencoder is in this folder: where they
    are if they moved with it, else where they were. UserError when one holds something else.
    """
    paths = []
    for content, (relative, absolute) in zip(source["contents"], source["paths"]):
        moved = os.path.normpath(os.path.join(os.path.realpath(folder), relative))
        there = [path for path in (moved, absolute) if os.path.isfile(path)]
        same = next((path for path in there if content_hash(path) == content), None)
        if not same:
            state = f"{there[0]} has changed" if there else f"{absolute} is gone"
            raise UserError(
                f"{state} since {folder}/sae.pt was trained on it: put it back, or name others "
                "to judge it on, as --acts='my/*.npy'"
            )
        paths.append(same)
    return paths


# -----------------------------------------------------------------------------
# the exact sparse step: a first reader may skip it. It computes nothing new, only faster.

warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")

PIECE = 512  # vectors whose pre-activations are in the processor's cache at a time


class SparseStep(torch.autograd.Function):
    """
    x_hat = ReLU(x W_enc + b_enc) W_dec + b_dec and its gradient, exact, at the cost of little
    more than one dense product, the encoder's. With ReLU the gradient is 0 wherever a feature
    is off, and nearly all are, so everything else touches the active entries alone. With f as
    a sparse matrix, s its sum over the batch, which the penalty is made of, and g = dL/df:

        g = dL/dx_hat W_dec^T + dL/ds, sampled at f > 0
        dL/dW_dec = f^T dL/dx_hat
        dL/dW_enc = x^T g

    Needs a CPU and torch's MKL.
    """

    @staticmethod
    def forward(ctx, x, W_enc, b_enc, W_dec, b_dec):
        """
        x (B, n), the weights -> x_hat (B, n), f summed over the batch (m,), number of active
        entries.
        """
        starts, columns, values = active_entries(x, W_enc, b_enc)
        f = csr(starts, columns, values, (len(x), len(b_enc)))  # (B, m)
        ctx.save_for_backward(x, W_enc, W_dec, starts, columns, values)
        f_sum = values.new_zeros(len(b_enc)).index_add_(0, columns, values)
        return f @ W_dec + b_dec, f_sum, starts[-1]  # where a next row would begin: all entries

    @staticmethod
    def backward(ctx, grad_x_hat, grad_f_sum, _):
        x, W_enc, W_dec, starts, columns, values = ctx.saved_tensors
        m = len(W_dec)
        through_f_sum = csr(starts, columns, grad_f_sum[columns], (len(x), m))  # (B, m)
        g = torch.sparse.sampled_addmm(through_f_sum, grad_x_hat, W_dec.t())
        grad_x = g @ W_enc.t() if ctx.needs_input_grad[0] else None
        f_t, g_t = transposed(starts, columns, [values, g.values()], m)  # (m, B) each
        grad_W_enc = (g_t @ x).t()  # (n, m)
        grad_b_enc = torch.zeros_like(W_dec[:, 0]).index_add_(0, columns, g.values())
        grad_W_dec = f_t @ grad_x_hat  # (m, n)
        return grad_x, grad_W_enc, grad_b_enc, grad_W_dec, grad_x_hat.sum(0)


def csr(starts, columns, values, shape):
    """A sparse matrix of a shape (B, m): see active_entries, which finds the other three."""
    return torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=False)


def transposed(starts, columns, values_of_each, m):
    """
    The transposes (m, B) of sparse matrices that have their entries in the same places: starts
    (B + 1,) and columns (entries,) as in csr, and a list of each matrix's values (entries,).
    """
    B = len(starts) - 1
    # torch would sort for each matrix anew, and numpy has a fast way for numbers of 16 bits
    small = columns.numpy().astype(np.uint16 if m <= 2**16 else np.int64)
    order = torch.from_numpy(np.argsort(small, kind="stable"))
    column_starts = torch.searchsorted(columns[order], torch.arange(m + 1))
    rows = torch.repeat_interleave(torch.arange(B), starts.diff())[order]
    return [csr(column_starts, rows, values[order], (m, B)) for values in values_of_each]


def active_entries(x, W_enc, b_enc):
    """
    Finds where x W_enc + b_enc > 0, for x (B, n), W_enc (n, m) and b_enc (m,). Returns starts
    (B + 1,), where each row's entries begin, and columns and values (entries,), row by row.
    """
    B, m = len(x), len(b_enc)
    z = x.new_empty(PIECE, m)  # used again for each piece, so that it stays in the cache
    places = []                # row * m + column of each active entry
    values = []
    for i in range(0, B, PIECE):
        piece = x[i:i + PIECE]
        product = torch.mm(piece, W_enc, out=z[:len(piece)])
        positive = np.flatnonzero((product > -b_enc).numpy())  # faster than torch's search
        positive = torch.from_numpy(positive)
        places.append(positive + i * m)
        values.append(product.view(-1)[positive])
    places = torch.cat(places)
    starts = torch.searchsorted(places, torch.arange(0, B * m + 1, m))
    columns = places % m
    values = torch.cat(values) + b_enc[columns]
    return starts, columns, values
