"""
sae.py against an independent reference: the papers' equations once more, in float64 numpy, with gradients derived by
hand. The reference itself is held against central differences and a case worked out on paper.

    python -m pytest -q tests/test_sae.py
"""
import copy
import dataclasses
import math
import os
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from model import UserError
from sae import (RECIPES, ActivationStore, Recipe, SAEConfig, SparseAutoencoder, SparseStep, all_finite,
                 explained_share, geometric_median, l1_at, load_sae, lr_at, massive_share, mean_share, paper_lambda,
                 resample_schedule, save_sae, show_explained, transposed, variance_of)

needs_mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="the sparse step needs MKL")
both_steps = pytest.mark.parametrize("sparse", [False, pytest.param(True, marks=needs_mkl)], ids=["dense", "sparse"])
PAPERS = ("scaling", "towards", "tied")             # a row that is added to RECIPES is another matter
every_recipe = pytest.mark.parametrize("recipe", PAPERS)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make(recipe, d_in=5, n_features=11, scale=0.7, input_norm="dataset"):
    """A float64 autoencoder in general position: no weight is 0, no row of unit norm, W_enc unlike W_dec."""
    sae = SparseAutoencoder(SAEConfig(d_in, n_features, recipe, input_norm)).double()
    for p in sae.parameters():
        torch.nn.init.normal_(p, std=0.8)
    sae.scale.fill_(scale)
    return sae


def inputs(n, d_in=5, seed=1):
    """n raw activations (n, d_in) in float64."""
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(n, d_in)))


def parameters(sae):
    """-> {name: float64 array}, what training changes."""
    return {name: p.detach().double().numpy().copy() for name, p in sae.named_parameters()}


def reference(params, scale, x, l1_coeff, recipe):
    """
    What the papers state, and by hand its gradient. x (B, n) raw; z = x_in W_enc + b_enc; G = dL/dx_hat; w_i = 1, in
    scaling ||W_dec_i||, which adds a term to the gradient of W_dec:

        G = 2 (x_hat - x) / B        dL/dz = (G W_dec^T + lambda w / B) where z > 0, 0 elsewhere
        W_dec: f^T G                 W_enc: x_in^T dL/dz               b_enc: sum_B dL/dz
        b_dec: sum_B G, and in towards, where x_in = x - b_dec, also -sum_B dL/dz W_enc^T
        tied: one matrix, so W_dec collects what W_enc would have had
    """
    W_dec, b_enc = params["W_dec"], params["b_enc"]
    W_enc = W_dec.T if recipe == "tied" else params["W_enc"]
    b_dec = np.zeros(W_dec.shape[1]) if recipe == "tied" else params["b_dec"]
    x, B = np.asarray(x, dtype=np.float64) * scale, len(x)
    norms = np.sqrt((W_dec ** 2).sum(axis=1))
    w = norms if recipe == "scaling" else np.ones_like(norms)

    x_in = x - b_dec if recipe == "towards" else x
    z = x_in @ W_enc + b_enc
    f = np.where(z > 0, z, 0.0)
    x_hat = f @ W_dec + b_dec
    squared_errors, sparsity = ((x - x_hat) ** 2).sum(axis=1), (f * w).sum(axis=1)     # one number an input

    G = 2 * (x_hat - x) / B
    dz = np.where(z > 0, G @ W_dec.T + l1_coeff * w / B, 0.0)
    grads = {"b_enc": dz.sum(axis=0), "W_dec": f.T @ G}
    if recipe == "tied":
        grads["W_dec"] += dz.T @ x_in
    else:
        grads |= {"W_enc": x_in.T @ dz, "b_dec": G.sum(axis=0)}
    if recipe == "towards":
        grads["b_dec"] -= (dz @ W_enc.T).sum(axis=0)
    if recipe == "scaling":
        grads["W_dec"] += l1_coeff / B * f.sum(axis=0)[:, None] * W_dec / norms[:, None]
    return SimpleNamespace(f=f, x_hat=x_hat / scale, loss=squared_errors.mean() + l1_coeff * sparsity.mean(),
                           mse=squared_errors.mean(), l1=sparsity.mean(), l0=(f > 0).sum(axis=1).mean(),
                           fired=(f > 0).any(axis=0), grads=grads)


def assert_close(actual, expected, rtol):
    """Within rtol of the largest expected entry."""
    actual = actual.detach().numpy() if torch.is_tensor(actual) else actual
    np.testing.assert_allclose(actual, expected, rtol=0, atol=rtol * max(np.abs(expected).max(), 1e-30))


# -----------------------------------------------------------------------------
# the reference

@every_recipe
def test_gradients_of_the_reference_agree_with_central_differences(recipe):
    params, x, h = parameters(make(recipe)), inputs(7), 1e-6
    grads = reference(params, 0.7, x, 0.8, recipe).grads
    assert grads.keys() == params.keys()
    for name, p in params.items():
        for i in np.ndindex(p.shape):
            old, around = p[i], []
            for p[i] in (old - h, old + h):
                around.append(reference(params, 0.7, x, 0.8, recipe).loss)
            p[i] = old
            assert (around[1] - around[0]) / (2 * h) == pytest.approx(grads[name][i], rel=1e-6, abs=1e-7)


# x = (3, 4) and (-3, 4), scale 2, so (6, 8) and (-6, 8). Only feature 0 reads, the first coordinate: z = (6, -6) + 1,
# less 1 in towards for b_dec = (1, 2). In scaling W_enc is halved and W_dec_0 = (2, 0), ||W_dec_0|| = 2.
#   scaling  f = 4, 0   x_hat = (9, 2), (1, 2)   errors 9 + 36, 49 + 36   sparsity 8, 0
#   towards  f = 6, 0   x_hat = (7, 2), (1, 2)   errors 1 + 36, 49 + 36   sparsity 6, 0
#   tied     f = 7, 0   x_hat = (7, 0), (0, 0)   errors 1 + 64, 36 + 64   sparsity 7, 0
WORKED_BY_HAND = {"scaling": (65.0, 4.0), "towards": (61.0, 3.0), "tied": (82.5, 3.5)}


@both_steps
@every_recipe
def test_loss_of_a_case_worked_by_hand(recipe, sparse):
    sae = SparseAutoencoder(SAEConfig(2, 2, recipe)).double()
    gain = 2.0 if recipe == "scaling" else 1.0
    with torch.no_grad():
        sae.W_dec.copy_(torch.tensor([[gain, 0.0], [0.0, 1.0]]))
        sae.b_enc.copy_(torch.tensor([1.0, -100.0]))
        if recipe != "tied":
            sae.W_enc.copy_(torch.tensor([[1 / gain, 0.0], [0.0, 1.0]]))
            sae.b_dec.copy_(torch.tensor([1.0, 2.0]))
        sae.scale.fill_(2.0)
    mse, l1 = WORKED_BY_HAND[recipe]
    loss, stats = sae.loss(torch.tensor([[3.0, 4.0], [-3.0, 4.0]], dtype=torch.float64), l1_coeff=10.0, sparse=sparse)
    assert (loss.item(), stats["mse"].item(), stats["l1"].item()) == (mse + 10 * l1, mse, l1)
    assert stats["l0"].item() == 0.5
    assert stats["fired"].tolist() == [True, False]


# -----------------------------------------------------------------------------
# forward, loss, gradients

@every_recipe
def test_encode_decode_and_forward_are_the_papers_equations(recipe):
    sae, x = make(recipe), inputs(6)
    expected = reference(parameters(sae), 0.7, x, 0.0, recipe)
    assert_close(sae.encode(x), expected.f, 1e-12)
    assert_close(sae.decode(sae.encode(x)), expected.x_hat, 1e-12)
    assert_close(sae(x), expected.x_hat, 1e-12)
    assert_close(sae(x.view(2, 3, 5)), expected.x_hat.reshape(2, 3, 5), 1e-12)         # any leading shape


@both_steps
@pytest.mark.parametrize("l1_coeff", [0.0, 0.8])
@every_recipe
def test_loss_and_every_gradient_equal_the_reference(recipe, l1_coeff, sparse):
    sae, x = make(recipe), inputs(7)
    expected = reference(parameters(sae), 0.7, x, l1_coeff, recipe)
    loss, stats = sae.loss(x, l1_coeff, sparse=sparse)
    loss.backward()
    assert loss.item() == pytest.approx(expected.loss, rel=1e-11)
    for name, rel in (("mse", 1e-11), ("l1", 1e-11), ("l0", 1e-6)):        # l0 divides two whole numbers: float32
        assert float(stats[name]) == pytest.approx(getattr(expected, name), rel=rel)
    assert stats["fired"].tolist() == expected.fired.tolist()
    grads = {name: p.grad for name, p in sae.named_parameters()}
    assert grads.keys() == expected.grads.keys()
    for name, grad in grads.items():
        assert_close(grad, expected.grads[name], 1e-10)


@every_recipe
def test_half_precision_activations_are_computed_in_the_weights_precision(recipe):
    sae, x = make(recipe), inputs(4).half()
    assert sae.loss(x, 0.8)[0].item() == pytest.approx(reference(parameters(sae), 0.7, x, 0.8, recipe).loss, rel=1e-11)
    assert_close(sae(x), reference(parameters(sae), 0.7, x, 0.8, recipe).x_hat, 1e-11)


@needs_mkl
@pytest.mark.parametrize("batch", [1, 33])
@pytest.mark.parametrize("density", [0.0, 0.01, 0.05, 0.3, 1.0])
@every_recipe
def test_sparse_step_equals_the_dense_step_in_float32(recipe, density, batch):
    sae, x, scale = make(recipe, d_in=12, n_features=40), inputs(batch, d_in=12), 0.7
    shift = sae.b_dec.detach() if recipe == "towards" else torch.zeros(12).double()
    empty_row = batch > 1 and density < 1
    if empty_row:
        x[5] = shift / scale                        # W_enc is applied to 0: no feature fires, as the bias is negative
    with torch.no_grad():
        z = ((scale * x - shift) @ sae.W_enc).numpy()
        sae.b_enc.fill_(-np.quantile(z, 1 - density) + (1e-3 if density == 1 else -1e-3))
    sae, x, results = sae.float(), x.float(), []
    for sparse in (True, False):
        sae.zero_grad()
        loss, stats = sae.loss(x, 0.8, sparse=sparse)
        loss.backward()
        stats["fired"] = stats["fired"].float()
        results.append(stats | {"loss": loss} | {name: p.grad.clone() for name, p in sae.named_parameters()})
    assert float(results[1]["l0"]) / 40 == pytest.approx(density, abs=0.03)
    if empty_row:
        assert not sae.encode(x)[5].any()
    for name, dense in results[1].items():
        assert results[0][name].shape == dense.shape
        assert_close(results[0][name], dense.detach().numpy(), 1e-5)


@pytest.mark.parametrize("m", [7, 2**16 + 3])  # a number of a column has 16 bits or more
def test_sparse_matrices_are_transposed_together(m):
    rng = np.random.default_rng(0)
    dense = np.zeros((5, m), dtype=np.float32)
    dense[rng.integers(0, 4, 40), rng.choice([0, 1, 5, m - 2, m - 1], 40)] = rng.standard_normal(40)  # a row stays empty
    sparse = torch.from_numpy(dense).to_sparse_csr()
    values = [sparse.values(), sparse.values().square()]
    first, second = transposed(sparse.crow_indices(), sparse.col_indices(), values, m)
    assert np.array_equal(first.to_dense().numpy(), dense.T)
    assert np.array_equal(second.to_dense().numpy(), (dense * dense).T)


def test_in_bfloat16_the_pre_activation_is_rounded_once():
    torch.manual_seed(0)
    sae = SparseAutoencoder(SAEConfig(64, 200))
    with torch.no_grad():
        sae.b_enc.copy_(torch.randn(200).bfloat16())
        sae.W_enc.copy_(sae.W_enc.bfloat16())
    x = torch.randn(50, 64).bfloat16().float()
    exact = x.double() @ sae.W_enc.double() + sae.b_enc.double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = sae.pre_activations(x)
    twice = (x @ sae.W_enc).bfloat16() + sae.b_enc  # what is near 0, where features switch on, comes out worst
    half_a_unit = 2**-8 * exact.abs() + 1e-6
    assert ((z - exact).abs() <= half_a_unit).all()
    assert ((twice - exact).abs() > half_a_unit).any()


@needs_mkl
@pytest.mark.parametrize("active, calls", [(1, 1), (4, 0)])
def test_the_sparse_step_is_picked_when_fewer_than_one_entry_in_ten_is_active(monkeypatch, active, calls):
    sae = SparseAutoencoder(SAEConfig(4, 20))
    with torch.no_grad():
        sae.W_enc.zero_()
        sae.b_enc.fill_(-1)
        sae.b_enc[:active] = 1                      # `active` of 20 features fire, on any input
    counted, apply = [], SparseStep.apply
    monkeypatch.setattr(SparseStep, "apply", lambda *args: counted.append(1) or apply(*args))
    x = inputs(8, d_in=4).float()
    loss = sae.loss(x, 0.8)[0].item()
    assert len(counted) == calls
    assert loss == pytest.approx(reference(parameters(sae), 1.0, x, 0.8, "scaling").loss, rel=1e-5)


def test_without_mkl_the_dense_step_takes_over(monkeypatch):
    sae = make("scaling").float()
    with torch.no_grad():
        sae.b_enc.fill_(-2.5)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    monkeypatch.setattr(SparseStep, "apply", lambda *args: pytest.fail("the sparse step needs MKL"))
    x = inputs(64).float()
    loss, stats = sae.loss(x, 0.8)
    assert 0 < stats["l0"] < 1.1  # few enough for the sparse step
    assert loss.item() == pytest.approx(reference(parameters(sae), 0.7, x, 0.8, "scaling").loss, rel=1e-5)


# -----------------------------------------------------------------------------
# some features only, and recipes of one's own

def test_every_recipe_says_whose_it_is_and_none_can_be_changed():
    assert all(re.search(r"et al\. 20\d\d", RECIPES[name].paper) for name in PAPERS)
    with pytest.raises(dataclasses.FrozenInstanceError):
        RECIPES["scaling"].tied = True


@pytest.mark.parametrize("input_norm", ["dataset", "token"])
@every_recipe
def test_some_features_are_encoded_as_all_are(recipe, input_norm):
    """The same ones everywhere, others for each context, or one for all contexts; on any number of vectors."""
    sae, x = make(recipe, input_norm=input_norm), inputs(12).view(3, 4, 5)
    f = sae.encode(x).detach()
    assert sae.encode(x, []).shape == (3, 4, 0)
    for features in ([7], [3, 0, 3], np.array([10, 2])):
        assert_close(sae.encode(x, features), f[..., list(features)].numpy(), 1e-12)
        assert_close(sae.encode(x[0], features), f[0][..., list(features)].numpy(), 1e-12)
    each = torch.tensor([[7, 1], [0, 0], [10, 3]])
    expected = np.stack([f[context][:, each[context]] for context in range(3)])
    assert_close(sae.encode(x, each), expected, 1e-12)
    assert_close(sae.encode(x, [[4]]), f[..., [4]].numpy(), 1e-12)


def top2(z):
    return torch.relu(z) * (z >= z.topk(2, dim=-1).values[..., -1:])


def jump(z):
    return z * (z > 0.3)


def almost_relu(z):
    return z * (z > 1e-5)


def capped(z):
    return z.clamp(0, 300)


ACTIVATIONS = {"top 2": top2, "a threshold": jump, "a threshold near 0": almost_relu, "a cap": capped,
               "softplus": torch.nn.functional.softplus, "a square": lambda z: torch.relu(z) ** 2}
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)


@pytest.fixture
def make_other(monkeypatch):
    """-> make_other(**fields of a Recipe): an autoencoder in general position, of a recipe that is a new row."""
    def make_other(input_norm="none", scale=1.0, **fields):
        monkeypatch.setitem(RECIPES, "other", Recipe("nobody", **fields))
        sae = make("other", input_norm=input_norm, scale=scale)
        sae.normalize_decoder()
        return sae
    return make_other


def test_an_activation_with_weights_of_its_own_is_trained_from_the_start(monkeypatch):
    """It is ReLU while its gain is 1: nothing may take the short cuts of ReLU, or the gain would stay there."""
    plain = SparseAutoencoder.__init__

    def with_gain(self, config):
        plain(self, config)
        self.log_gain = torch.nn.Parameter(torch.zeros(config.n_features))

    def activation(self, z):
        return self.log_gain.exp() * z.relu()

    monkeypatch.setattr(SparseAutoencoder, "__init__", with_gain)
    monkeypatch.setattr(SparseAutoencoder, "activation", activation)
    sae = SparseAutoencoder(SAEConfig(5, 11))
    torch.nn.init.constant_(sae.b_enc, -1.0)  # few are active: of a ReLU the sparse step would pay
    x = 3 * inputs(64).float()
    sae.loss(x, 0.1)[0].backward()
    assert sae.log_gain.grad.abs().max() > 0
    with pytest.raises(ValueError):
        sae.loss(x, 0.1, sparse=True)
    torch.nn.init.normal_(sae.log_gain)
    assert_close(sae.fold()(x), sae(x).detach().numpy(), 1e-5)


@pytest.mark.parametrize("where", ["in the recipe", "in the class"])
@every_activation
def test_another_activation_is_that_of_training_and_of_every_analysis(make_other, monkeypatch, activation, where):
    """Said once, it is in encode (all features, some, one a context), the loss, its gradients, resampling, fold."""
    if where == "in the recipe":
        sae = make_other(activation=activation, unit_rows=True)
    else:
        sae = make_other(unit_rows=True)
        monkeypatch.setattr(SparseAutoencoder, "activation", lambda self, z: activation(z))
    x = inputs(12).view(3, 4, 5)
    f = activation(x @ sae.W_enc + sae.b_enc)                                      # (3, 4, 11)
    assert_close(sae.encode(x), f.detach().numpy(), 1e-12)
    assert_close(sae.encode(x, [4, 9]), f[..., [4, 9]].detach().numpy(), 1e-12)
    each = torch.tensor([[1], [8], [2]])
    assert_close(sae.encode(x, each), np.stack([f[k][:, each[k]].detach() for k in range(3)]), 1e-12)
    assert_close(sae.encode(x, [[6]]), f[..., [6]].detach().numpy(), 1e-12)
    assert_close(sae.fold().encode(x), f.detach().numpy(), 1e-12)
    assert_close(sae.fold()(x), sae(x).detach().numpy(), 1e-12)

    x, f = x.view(12, 5), f.view(12, 11)
    each_loss = (f @ sae.W_dec + sae.b_dec - x).square().sum(1) + 0.8 * f.sum(1)   # (12,)
    loss, stats = sae.loss(x, 0.8)
    assert not sae.is_relu
    assert loss.item() == pytest.approx(each_loss.mean().item(), rel=1e-11)
    assert stats["l0"].item() == pytest.approx((f > 0).sum(1).double().mean().item(), rel=1e-6)
    assert stats["fired"].tolist() == (f > 0).any(0).tolist()
    assert_close(sae.losses(x, 0.8), each_loss.detach().numpy(), 1e-11)
    expected = torch.autograd.grad(each_loss.mean(), list(sae.parameters()))
    for got, gradient in zip(torch.autograd.grad(loss, list(sae.parameters())), expected):
        assert_close(got, gradient.numpy(), 1e-11)


@needs_mkl
@pytest.mark.parametrize("change", [*ACTIVATIONS.values(), "penalty"], ids=[*ACTIVATIONS, "another penalty"])
def test_the_sparse_step_is_never_taken_for_what_it_does_not_compute(make_other, monkeypatch, change):
    monkeypatch.setattr(SparseStep, "apply", lambda *args: pytest.fail("it computes ReLU and L1"))
    fields = {"penalty": torch.tanh} if change == "penalty" else {"activation": change}
    sae = make_other(**fields).float()
    with torch.no_grad():
        sae.b_enc.fill_(-4)                         # so few are active that the sparse step would pay
    sae.loss(inputs(64).float(), 0.8)
    with pytest.raises(ValueError, match="ReLU"):
        sae.loss(inputs(64).float(), 0.8, sparse=True)


@pytest.mark.parametrize("norms", [False, True])
def test_another_penalty_is_that_of_the_loss_and_of_resampling(make_other, norms):
    """Of the activations in units of what they write: a longer row and a shorter column are the same feature."""
    sae, x = make_other(penalty=torch.tanh, norms_in_penalty=norms), inputs(9)
    f = torch.relu(x @ sae.W_enc + sae.b_enc)
    written = f * sae.W_dec.norm(dim=1) if norms else f
    each_loss = (f @ sae.W_dec + sae.b_dec - x).square().sum(1) + 0.8 * torch.tanh(written).sum(1)
    assert sae.loss(x, 0.8)[0].item() == pytest.approx(each_loss.mean().item(), rel=1e-11)
    assert_close(sae.losses(x, 0.8), each_loss.detach().numpy(), 1e-11)


@pytest.mark.parametrize("input_norm", ["dataset", "token"])
@every_activation
def test_norms_and_scale_are_folded_whatever_the_activation(make_other, tmp_path, activation, input_norm):
    """Norms would change which entries are largest, norms and scale would move a threshold; here they do not."""
    sae, x = make_other(input_norm, 2.5, activation=activation, pre_bias=True), 3 * inputs(20)
    norms = sae.W_dec.norm(dim=1).detach().numpy()
    folded = sae.fold()
    scale = 2.5 if input_norm == "dataset" else 1.0
    assert_close(folded.encode(x), sae.encode(x).detach().numpy() * norms / scale, 1e-10)
    assert_close(folded(x), sae(x).detach().numpy(), 1e-10)
    assert_close(folded.encode(x, [3, 1]), folded.encode(x)[:, [3, 1]].detach().numpy(), 1e-12)
    with pytest.raises(ValueError, match="fold"):    # a file would not hold what fold has done
        save_sae(tmp_path / "sae.pt", folded)


@pytest.mark.parametrize("fields", [dict(tied=True, pre_bias=True), dict(tied=True, median_start=True),
                                    dict(project_gradient=True)], ids=str)
def test_rows_that_contradict_themselves_are_refused(fields):
    with pytest.raises(ValueError, match="recipe|rows"):
        Recipe("nobody", **fields)


# -----------------------------------------------------------------------------
# unit decoder rows (Towards Monosemanticity, appendix: the part of the gradient along a row is removed)

def test_towards_removes_the_gradient_along_each_row_and_nothing_else():
    sae = SparseAutoencoder(SAEConfig(5, 11, "towards")).double()
    W = sae.W_dec.detach().numpy()
    W = W / np.linalg.norm(W, axis=1, keepdims=True)
    with torch.no_grad():
        sae.W_dec.copy_(torch.from_numpy(W))
    gradient = inputs(11).numpy()
    sae.W_dec.grad = torch.from_numpy(gradient.copy())
    sae.remove_parallel_gradient()
    left = sae.W_dec.grad.numpy()
    for i in range(11):
        assert left[i] @ W[i] == pytest.approx(0, abs=1e-14)
        np.testing.assert_allclose(left[i], gradient[i] - (gradient[i] @ W[i]) * W[i], atol=1e-14)


@pytest.mark.parametrize("recipe", ["towards", "tied"])
def test_rows_of_the_decoder_are_of_unit_norm_after_every_step(recipe):
    sae, x = SparseAutoencoder(SAEConfig(5, 11, recipe)).double(), inputs(16)
    optimizer = torch.optim.Adam(sae.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        sae.loss(x, 0.1)[0].backward()
        sae.remove_parallel_gradient()
        optimizer.step()
        stepped = sae.W_dec.detach().numpy().copy()
        assert np.abs(np.linalg.norm(stepped, axis=1) - 1).max() > 1e-3      # Adam's step leaves the unit sphere
        sae.normalize_decoder()
        assert_close(sae.W_dec, stepped / np.linalg.norm(stepped, axis=1)[:, None], 1e-14)


def test_scaling_keeps_free_norms_and_the_whole_gradient():
    sae = make("scaling")
    W, gradient = sae.W_dec.detach().clone(), inputs(11)
    sae.W_dec.grad = gradient.clone()
    sae.remove_parallel_gradient()
    sae.normalize_decoder()
    assert torch.equal(sae.W_dec, W)
    assert torch.equal(sae.W_dec.grad, gradient)


# -----------------------------------------------------------------------------
# resampling (Towards Monosemanticity, appendix)

def adam(sae, steps=2):
    """Adam, after a few steps along random gradients, so that no moment is 0."""
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
    for _ in range(steps):
        for p in sae.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    return optimizer


def moments(sae, optimizer):
    """-> {(parameter, moment): array} as they are now."""
    return {(name, moment): optimizer.state[p][moment].numpy().copy()
            for name, p in sae.named_parameters() for moment in ("exp_avg", "exp_avg_sq")}


def feature_first(name, array):
    """View with the features along the first axis; b_dec has none and is returned as it is."""
    return array.T if name == "W_enc" else array


def mask(n_features, dead):
    return torch.tensor([i in dead for i in range(n_features)])


resampled_sizes = pytest.mark.parametrize("d_in, n_features", [(5, 11), (6, 6)], ids=["wide", "square"])


@resampled_sizes
@every_recipe
def test_resampling_gives_dead_features_new_weights_and_leaves_the_others(recipe, d_in, n_features):
    sae, x = make(recipe, d_in, n_features), inputs(40, d_in)
    optimizer, dead = adam(sae), [0, 3, 4]
    alive = [i for i in range(n_features) if i not in dead]
    before = parameters(sae)
    assert sae.resample(mask(n_features, dead), x, optimizer, 0.5) == 3
    after = parameters(sae)
    for name in before:
        kept = slice(None) if name == "b_dec" else alive
        np.testing.assert_array_equal(feature_first(name, after[name])[kept], feature_first(name, before[name])[kept])
    read = 0.7 * x.numpy()                              # what the encoder reads: in towards less b_dec
    if recipe == "towards":
        read = read - before["b_dec"]
    unit_inputs = read / np.linalg.norm(read, axis=1, keepdims=True)
    for i in dead:
        assert np.abs(unit_inputs - after["W_dec"][i]).max(axis=1).min() < 1e-14      # the row is some x / ||x||
        if recipe == "tied":                        # one matrix: see the test of its newcomers below
            assert after["b_enc"][i] < 0
        else:
            assert after["b_enc"][i] == 0
            alive_norm = np.linalg.norm(before["W_enc"][:, alive], axis=0).mean()
            np.testing.assert_allclose(after["W_enc"][:, i], 0.2 * alive_norm * after["W_dec"][i], rtol=1e-12)


@resampled_sizes
@every_recipe
def test_resampling_clears_adams_moments_of_the_touched_entries_alone(recipe, d_in, n_features):
    sae, dead = make(recipe, d_in, n_features), [1, 5]
    optimizer = adam(sae)
    before = moments(sae, optimizer)
    sae.resample(mask(n_features, dead), inputs(40, d_in), optimizer, 0.5)
    for (name, moment), old in before.items():
        expected = old.copy()
        if name != "b_dec":
            feature_first(name, expected)[dead] = 0
        now = moments(sae, optimizer)[name, moment]
        np.testing.assert_array_equal(now, expected, err_msg=f"{moment} of {name}")


# scale 1/2, lambda 1. Features 0 and 1 read the positive coordinates and give them back, feature 2 is dead:
#   x = (4, 0)   scaled (2, 0)    no error, sparsity 2   loss 2
#   x = (-2, 0)  scaled (-1, 0)   nothing fires          loss 1
#   x = (0, -4)  scaled (0, -2)   nothing fires          loss 4
# In scaling W_dec is doubled and W_enc halved, so f = 1 counts ||W_dec_i|| = 2 times: the losses are the same.
DRAWN_FROM = torch.tensor([[4.0, 0.0], [-2.0, 0.0], [0.0, -4.0]])
SQUARED = np.array([4, 1, 16]) / 21
MISTAKES = {"the loss itself": np.array([2, 1, 4]) / 7, "no L1": np.array([0, 1, 16]) / 17, "even": np.ones(3) / 3,
            "raw units, or L1 without decoder norms": np.array([1, 1, 16]) / 18}


@every_recipe
def test_inputs_are_drawn_with_odds_of_their_squared_loss(recipe):
    gain, n_draws, tolerance = (2.0 if recipe == "scaling" else 1.0), 1500, 0.04        # 0.04: 3.6 standard errors
    sae = SparseAutoencoder(SAEConfig(2, 3, recipe))
    with torch.no_grad():
        sae.W_dec.copy_(gain * torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]))
        if recipe != "tied":
            sae.W_enc.copy_(sae.W_dec.t() / gain ** 2)
        sae.b_enc[2] = -10.0
        sae.scale.fill_(0.5)
    optimizer = torch.optim.Adam(sae.parameters())
    start, counts = copy.deepcopy(sae.state_dict()), np.zeros(3)
    for _ in range(n_draws):
        sae.load_state_dict(start)
        sae.resample(mask(3, [2]), DRAWN_FROM, optimizer, 1.0)
        counts[int((DRAWN_FROM @ sae.W_dec[2].detach()).argmax())] += 1
    assert np.abs(counts / n_draws - SQUARED).max() < tolerance
    for mistake, odds in MISTAKES.items():
        assert np.abs(counts / n_draws - odds).max() > 2 * tolerance, mistake


def test_the_draw_is_over_all_of_the_sample():
    sae = SparseAutoencoder(SAEConfig(3, 4, "towards"))
    x = 1e-3 * torch.randn(5000, 3)
    x[4500] = torch.tensor([3.0, 0.0, -4.0])        # the only input with a loss worth mentioning
    sae.resample(mask(4, [2]), x.half(), adam(sae), 0.1)         # in the precision of the files
    read = np.array([3.0, 0.0, -4.0]) - sae.b_dec.detach().numpy()
    assert_close(sae.W_dec[2], read / np.linalg.norm(read), 1e-6)


@every_recipe
def test_without_dead_features_resampling_changes_nothing(recipe):
    sae = make(recipe)
    optimizer = adam(sae)
    weights_before, moments_before = parameters(sae), moments(sae, optimizer)
    assert sae.resample(mask(11, []), inputs(40), optimizer, 0.5) == 0
    for before, after in ((weights_before, parameters(sae)), (moments_before, moments(sae, optimizer))):
        for key in before:
            np.testing.assert_array_equal(before[key], after[key])


@pytest.mark.parametrize("n_inputs", [4, 40])
@every_recipe
def test_all_features_may_be_dead_and_outnumber_the_inputs(recipe, n_inputs):
    sae, x = make(recipe), inputs(n_inputs)
    assert sae.resample(torch.ones(11, dtype=torch.bool), x, adam(sae), 0.5) == 11
    read = 0.7 * x.numpy() - (sae.b_dec.detach().numpy() if recipe == "towards" else 0)
    cosines = (sae.W_dec.detach().numpy() @ read.T) / np.linalg.norm(read, axis=1)
    np.testing.assert_allclose(cosines.max(axis=1), 1, rtol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(sae.W_dec.detach().numpy(), axis=1), 1, rtol=1e-12)
    encoder = sae.W_enc.detach().numpy().T
    lengths = np.linalg.norm(encoder, axis=1, keepdims=True)
    assert (lengths > 0).all()
    np.testing.assert_allclose(encoder / lengths, sae.W_dec.detach().numpy(), rtol=1e-12)
    assert (sae.b_enc < 0).all() if recipe == "tied" else not sae.b_enc.any()


@pytest.mark.parametrize("input_norm", ["dataset", "token"])
def test_with_tied_weights_the_bias_makes_a_newcomer_as_quiet_as_a_short_column_would(input_norm):
    """On the input it was drawn at it starts at 0.2 ||x||, in scaled units, as an untied one of column norm 0.2 does."""
    sae, x = make("tied", input_norm=input_norm), 3 * inputs(40)
    dead = [0, 3, 4]
    assert sae.resample(mask(11, dead), x, adam(sae), 0.5) == 3
    own = np.sqrt(5) / np.linalg.norm(x.numpy(), axis=1, keepdims=True) if input_norm == "token" else 0.7
    scaled = x.numpy() * own
    norms = np.linalg.norm(scaled, axis=1)
    f = sae.encode(x).detach().numpy()
    for i in dead:
        drawn = (scaled / norms[:, None] @ sae.W_dec[i].detach().numpy()).argmax()
        assert f[drawn, i] == pytest.approx(0.2 * norms[drawn], rel=1e-5)


def test_resampling_tied_weights_leaves_the_loss_about_where_it_was():
    """With a bias of 0 each newcomer would fire on half of the inputs, at full strength: 50 times this loss."""
    sae, x = SparseAutoencoder(SAEConfig(8, 200, "tied")), inputs(400, d_in=8).float()
    sae.fit_to(x)
    dead = torch.arange(200) >= 20
    with torch.no_grad():
        sae.b_enc[dead] = -100.0
    before = sae.loss(x, 0.5)[0].item()
    sae.resample(dead, x, torch.optim.Adam(sae.parameters()), 0.5)
    assert sae.loss(x, 0.5)[0].item() < 2 * before
    with torch.no_grad():
        sae.b_enc[dead] = 0.0
    assert sae.loss(x, 0.5)[0].item() > 50 * before


@every_recipe
def test_resampling_works_before_adams_first_step(recipe):
    sae, x = make(recipe), inputs(40)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
    assert sae.resample(mask(11, [2, 7]), x, optimizer, 0.5) == 2
    before = parameters(sae)
    sae.loss(x, 0.5)[0].backward()
    optimizer.step()
    for name, p in parameters(sae).items():
        assert np.abs(p - before[name]).max() == pytest.approx(1e-3, rel=1e-3)       # Adam's first step has length lr


@pytest.mark.parametrize("dead", [[2], [2, 5, 9]], ids=str)
@every_recipe
def test_an_input_of_zeros_becomes_no_decoder_row(recipe, dead):
    sae, x = make(recipe), torch.zeros(1000, 5, dtype=torch.float64)   # with biases, zeros have a loss too
    x[6] = inputs(1)
    optimizer = adam(sae)
    sae.b_dec.data.zero_()                              # towards reads x - b_dec, so that zeros are zeros
    assert sae.resample(mask(11, dead), x, optimizer, 0.5) == len(dead)
    for i in dead:
        assert_close(sae.W_dec[i], x[6].numpy() / np.linalg.norm(x[6].numpy()), 1e-14)


def test_a_perfect_autoencoder_can_be_resampled():
    sae = SparseAutoencoder(SAEConfig(2, 3, "tied"))
    with torch.no_grad():
        sae.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]))
        sae.b_enc[2] = -10.0
    sae.resample(mask(3, [2]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]), adam(sae, steps=0), 0.0)
    assert sorted(sae.W_dec[2].tolist()) == [0.0, 1.0]


# -----------------------------------------------------------------------------
# schedules

@pytest.mark.parametrize("step, share", [(0, 0.0), (1, 0.02), (25, 0.5), (49, 0.98), (50, 1.0), (51, 1.0), (999, 1.0)])
def test_scaling_raises_lambda_from_zero_over_the_first_twentieth(step, share):
    assert l1_at(step, 1000, 5.0, RECIPES["scaling"]) == pytest.approx(5.0 * share)


@pytest.mark.parametrize("step, share", [(0, 1.0), (799, 1.0), (800, 1.0), (801, 0.995), (900, 0.5), (999, 0.005),
                                         (1000, 0.0)])
def test_scaling_lowers_the_learning_rate_to_zero_over_the_last_fifth(step, share):
    assert lr_at(step, 1000, 4e-4, RECIPES["scaling"]) == pytest.approx(4e-4 * share)


@pytest.mark.parametrize("step", [0, 1, 500, 999])
@pytest.mark.parametrize("recipe", ["towards", "tied"])
def test_towards_and_tied_keep_lambda_and_learning_rate(recipe, step):
    recipe = RECIPES[recipe]
    assert (l1_at(step, 1000, 5.0, recipe), lr_at(step, 1000, 4e-4, recipe)) == (5.0, 4e-4)


@pytest.mark.parametrize("max_iters, steps, window", [
    (1_000_000, [25_000, 50_000, 75_000, 100_000], 12_500),
    (200_000, [25_000, 50_000, 75_000, 100_000], 12_500),
    (100_000, [40_000, 50_000, 60_000, 70_000, 80_000, 90_000], 10_000),
    (1500, [600, 750, 900, 1050, 1200, 1350], 150)])
def test_resampling_steps_are_the_papers_or_those_of_a_short_run(max_iters, steps, window):
    assert resample_schedule(max_iters, RECIPES["towards"]) == (steps, window)
    # what does not resample has a window as well: for the log, and for --resample
    assert resample_schedule(max_iters, RECIPES["scaling"]) == ([], window)
    assert resample_schedule(max_iters, RECIPES["tied"]) == ([], window)


def test_a_recipes_own_resampling_steps_are_taken_in_a_run_twice_as_long():
    own = Recipe("nobody", resample_steps=(300, 600), dead_steps=50)
    assert resample_schedule(1200, own) == ([300, 600], 50)
    assert resample_schedule(1199, own) == ([479, 599, 719, 839, 959, 1079], 119)
    assert resample_schedule(1200, dataclasses.replace(own, dead_steps=12_500)) == ([300, 600], 120)


def test_encoding_some_features_has_the_gradients_of_encoding_all():
    sae, x = make("towards"), inputs(20)
    some = torch.autograd.grad(sae.encode(x, [1, 4, 7]).sum(), list(sae.parameters()), allow_unused=True)
    every = torch.autograd.grad(sae.encode(x)[:, [1, 4, 7]].sum(), list(sae.parameters()), allow_unused=True)
    for (name, _), got, expected in zip(sae.named_parameters(), some, every):
        assert (got is None and expected is None) or torch.allclose(got, expected), name


# -----------------------------------------------------------------------------
# fold

@pytest.mark.parametrize("input_norm", ["dataset", "token"])
@every_recipe
def test_fold_keeps_every_reconstruction_and_gives_unit_rows(recipe, input_norm):
    sae, x = make(recipe, input_norm=input_norm), inputs(20)
    norms = np.linalg.norm(parameters(sae)["W_dec"], axis=1)
    before = copy.deepcopy(sae.state_dict())
    folded = sae.fold()
    assert_close(folded(x), sae(x).detach().numpy(), 1e-12)
    scale = 0.7 if input_norm == "dataset" else 1.0             # each vector's own scale stays
    assert_close(folded.encode(x), sae.encode(x).detach().numpy() * norms / scale, 1e-12)
    np.testing.assert_allclose(np.linalg.norm(parameters(folded)["W_dec"], axis=1), 1, rtol=1e-12)
    for name, value in sae.state_dict().items():
        assert torch.equal(value, before[name])     # the autoencoder itself stays as it was


@every_recipe
def test_a_folded_autoencoder_is_one_affine_map_relu_another(recipe):
    """ReLU(x W_enc + b_enc) W_dec + b_dec on raw x, and the names and shapes by which SAELens loads it."""
    sae, x = make(recipe), inputs(20)
    folded = sae.fold()
    assert folded.scale == 1
    state = {name: value.numpy() for name, value in folded.state_dict().items()}
    assert {name: value.shape for name, value in state.items()} == {
        "W_enc": (5, 11), "b_enc": (11,), "W_dec": (11, 5), "b_dec": (5,)}
    f = np.maximum(x.numpy() @ state["W_enc"] + state["b_enc"], 0)
    expected = reference(parameters(sae), 0.7, x, 0.0, recipe)
    np.testing.assert_allclose(f @ state["W_dec"] + state["b_dec"], expected.x_hat, atol=1e-12)
    np.testing.assert_allclose(f, expected.f * np.linalg.norm(parameters(sae)["W_dec"], axis=1) / 0.7, atol=1e-12)


# -----------------------------------------------------------------------------
# starting point

@pytest.mark.parametrize("recipe, pre_bias", [("scaling", True), ("towards", False)])
def test_the_pre_encoder_bias_can_be_had_apart_from_the_recipe(tmp_path, recipe, pre_bias):
    """x_in = x - b_dec or x, in encode, loss, gradients of both steps, fold and on disk; all else is the recipe's."""
    sae = SparseAutoencoder(SAEConfig(5, 11, recipe, pre_bias=pre_bias))
    for p in sae.parameters():
        torch.nn.init.normal_(p, std=0.8)
    x = inputs(7).float()
    f = torch.relu((x - sae.b_dec * pre_bias) @ sae.W_enc + sae.b_enc)
    torch.testing.assert_close(sae.encode(x), f)
    weighted = f * sae.W_dec.norm(dim=1) if recipe == "scaling" else f
    expected = (f @ sae.W_dec + sae.b_dec - x).square().sum(1).mean() + 0.3 * weighted.sum(1).mean()
    gradients = torch.autograd.grad(expected, list(sae.parameters()))
    for sparse in [False] + [True] * torch.backends.mkl.is_available():
        loss, _ = sae.loss(x, 0.3, sparse=sparse)
        torch.testing.assert_close(loss, expected)
        for got, gradient in zip(torch.autograd.grad(loss, list(sae.parameters())), gradients):
            torch.testing.assert_close(got, gradient)
    torch.testing.assert_close(sae.fold()(x), sae(x))
    save_sae(tmp_path / "sae.pt", sae)
    torch.testing.assert_close(load_sae(tmp_path / "sae.pt")(x), sae(x))


def test_the_scale_makes_the_mean_squared_norm_the_width():
    sae, x = SparseAutoencoder(SAEConfig(5, 11)), 30 * inputs(200) + 7
    sae.fit_to(x)
    assert ((sae.scale.item() * x.numpy()) ** 2).sum(axis=1).mean() == pytest.approx(5, rel=1e-5)
    half = SparseAutoencoder(SAEConfig(5, 11))
    half.fit_to(x.half())
    assert half.scale.item() == pytest.approx(sae.scale.item(), rel=1e-3)


@pytest.mark.parametrize("size", [1e18, 1e-18])
@pytest.mark.parametrize("input_norm", ["dataset", "token"])
def test_the_scale_is_right_where_squares_leave_float32(input_norm, size):
    """And a power of two changes no bit of it: what is divided by one is not rounded."""
    x = (inputs(200) * size).float()
    sae = SparseAutoencoder(SAEConfig(5, 11, input_norm=input_norm))
    sae.fit_to(x)
    exact = x.double().numpy()
    squares = (exact ** 2).sum(axis=1)
    assert sae.scale.item() == pytest.approx(np.sqrt(5 / squares.mean()), rel=1e-6)
    own = sae.scale.item() if input_norm == "dataset" else np.sqrt(5 / squares)[:, None]
    assert_close(sae.scaled(x), exact * own, 1e-6)
    other = SparseAutoencoder(SAEConfig(5, 11, input_norm=input_norm))
    other.fit_to(x * 2.0 ** 7)
    assert other.scale.item() == sae.scale.item() / 2 ** 7


# -----------------------------------------------------------------------------
# --center: the mean is taken off before the scale

@pytest.fixture
def make_centred():
    """-> make_centred(recipe, input_norm): in general position, with a mean far from 0."""
    def make_centred(recipe, input_norm="dataset", n_features=11):
        sae = SparseAutoencoder(SAEConfig(5, n_features, recipe, input_norm, center=True)).double()
        for p in sae.parameters():
            torch.nn.init.normal_(p, std=0.8)
        sae.scale.fill_(0.7)
        sae.mean.copy_(torch.tensor([50.0, -30.0, 0.0, 7.0, 1.0]))
        return sae
    return make_centred


def own_scale(x, input_norm):
    """What centred x (N, 5), numpy, is multiplied by."""
    return np.sqrt(5) / np.linalg.norm(x, axis=1, keepdims=True) if input_norm == "token" else 0.7


both_norms = pytest.mark.parametrize("input_norm", ["dataset", "token"])


@both_steps
@both_norms
@every_recipe
def test_with_center_all_is_that_of_x_less_the_mean(make_centred, recipe, input_norm, sparse):
    """encode, of all and of some; decode, forward, loss and its gradients; the losses of resampling."""
    sae = make_centred(recipe, input_norm)
    x = inputs(12) + sae.mean
    away = x.numpy() - sae.mean.numpy()
    own = own_scale(away, input_norm)
    expected = reference(parameters(sae), 1.0, away * own, 0.8, recipe)
    tolerance = 1e-11 if input_norm == "dataset" else 1e-6         # a vector's own norm is taken in float32
    assert_close(sae.encode(x), expected.f, tolerance)
    assert_close(sae.encode(x, [7, 2]), expected.f[:, [7, 2]], tolerance)
    assert_close(sae.encode(x.view(3, 4, 5), [[1], [8], [2]])[1], expected.f[4:8, [8]], tolerance)
    assert_close(sae(x) - sae.mean, expected.x_hat / own, tolerance)
    assert_close(sae.decode(sae.encode(x), sae.input_scale(x)) - sae.mean, expected.x_hat / own, tolerance)
    loss, stats = sae.loss(x, 0.8, sparse=sparse)
    assert loss.item() == pytest.approx(expected.loss, rel=tolerance)
    assert stats["mse"].item() == pytest.approx(expected.mse, rel=tolerance)
    assert sae.losses(x, 0.8).mean().item() == pytest.approx(expected.loss, rel=tolerance)
    loss.backward()
    for name, p in sae.named_parameters():
        assert_close(p.grad, expected.grads[name], 10 * tolerance)


@both_norms
@every_recipe
def test_the_mean_is_folded_into_both_biases(make_centred, recipe, input_norm):
    """With a scale for each vector it stays beside them, as that scale does: a scale of x less the mean."""
    sae = make_centred(recipe, input_norm)
    x = inputs(20) + sae.mean
    folded = sae.fold()
    scale = 0.7 if input_norm == "dataset" else 1.0
    norms = np.linalg.norm(parameters(sae)["W_dec"], axis=1)
    assert_close(folded(x) - sae.mean, (sae(x) - sae.mean).detach().numpy(), 1e-11)
    assert_close(folded.encode(x), sae.encode(x).detach().numpy() * norms / scale, 1e-11)
    assert folded.config.center == (input_norm == "token") and sae.config.center
    if input_norm == "dataset":
        state = {name: value.numpy() for name, value in folded.state_dict().items()}
        f = np.maximum(x.numpy() @ state["W_enc"] + state["b_enc"], 0)
        assert_close(f @ state["W_dec"] + state["b_dec"], sae(x).detach().numpy(), 1e-11)


@both_norms
@every_recipe
def test_the_mean_is_saved_and_loaded_exactly(make_centred, tmp_path, recipe, input_norm):
    sae, x = make_centred(recipe, input_norm).float(), inputs(6).float() + 9
    save_sae(tmp_path / "sae.pt", sae, step=3)
    loaded = load_sae(tmp_path / "sae.pt")
    assert loaded.config == sae.config and torch.equal(loaded.mean, sae.mean)
    assert torch.equal(loaded(x), sae(x)) and loaded.extra == {"step": 3}


def test_a_file_from_before_there_was_a_mean_is_loaded(tmp_path):
    sae, x = make("towards").float(), inputs(6).float()
    save_sae(tmp_path / "sae.pt", sae)
    checkpoint = torch.load(tmp_path / "sae.pt", weights_only=True)
    del checkpoint["mean"], checkpoint["config"]["center"]
    torch.save(checkpoint, tmp_path / "sae.pt")
    assert torch.equal(load_sae(tmp_path / "sae.pt")(x), sae(x))


@pytest.mark.parametrize("input_norm", ["dataset", "token", "none"])
@every_recipe
def test_the_start_with_center_is_that_of_rows_without_their_mean(recipe, input_norm):
    """Scale, geometric median, and all but the mean, as if somebody had taken it off the rows by hand."""
    x = 3 * inputs(400) ** 2
    far = x + torch.tensor([500.0, -300.0, 0.0, 70.0, 10.0])
    torch.manual_seed(0)
    sae = SparseAutoencoder(SAEConfig(5, 11, recipe, input_norm, center=True)).double()
    sae.fit_to(far)
    torch.manual_seed(0)
    by_hand = SparseAutoencoder(SAEConfig(5, 11, recipe, input_norm)).double()
    by_hand.fit_to(far - far.mean(0))
    assert_close(sae.mean, far.numpy().mean(axis=0), 1e-7)
    assert sae.scale.item() == pytest.approx(by_hand.scale.item(), rel=1e-5)
    assert_close(sae.b_dec, by_hand.b_dec.detach().numpy(), 1e-4)
    f = by_hand.encode(far - far.mean(0)).detach().numpy()
    assert_close(sae.encode(far), f, 1e-4)


@both_norms
@every_recipe
def test_resampling_with_center_takes_directions_from_the_mean(make_centred, recipe, input_norm):
    """And what equals the mean has none, as zeros have none without it."""
    sae = make_centred(recipe, input_norm)
    optimizer = adam(sae)
    sae.b_dec.data.zero_()                              # towards takes it off, too
    x = sae.mean.expand(50, 5).clone()
    x[6] += torch.tensor([3.0, 0.0, -4.0, 0.0, 0.0])
    assert sae.resample(mask(11, [2, 5]), x, optimizer, 0.5) == 2
    assert_close(sae.W_dec[[2, 5]], np.array([[0.6, 0.0, -0.8, 0.0, 0.0]] * 2), 1e-12)


def test_the_share_of_the_mean_is_that_of_the_squared_norm():
    x = inputs(500).numpy() + np.array([3.0, 0, 0, -2.0, 0])
    expected = (x.mean(axis=0) ** 2).sum() / (x ** 2).sum(axis=1).mean()
    for rows in (torch.from_numpy(x), 1e18 * torch.from_numpy(x).float(), 100 * torch.from_numpy(x).half()):
        assert mean_share(rows) == pytest.approx(expected, rel=2e-3)
    assert 0.6 < expected < 0.8 and mean_share(torch.full((30, 3), 0.1)) == pytest.approx(1)


def test_variance_is_about_the_mean_however_large_that_is():
    x = inputs(300).numpy()
    for far in (x, x.astype(np.float32) + np.float32(60_000), 1e18 * x):
        far = far.astype(np.float32)
        expected = ((far.astype(np.float64) - far.mean(axis=0, dtype=np.float64)) ** 2).sum()
        assert variance_of(torch.from_numpy(far)) == pytest.approx(expected, rel=1e-12)
    for same in (torch.full((30, 3), 0.1), torch.full((7, 2), 6e4).half(), torch.ones(1, 4)):
        assert variance_of(same) == 0


def test_without_variance_nothing_is_explained():
    assert (explained_share(3.0, 12.0), show_explained(0.75)) == (0.75, "0.750")
    assert explained_share(3.0, 0.0) is None
    assert show_explained(None) == "undefined (no two rows differ)"


def test_input_norm_none_stays_in_raw_units():
    sae = SparseAutoencoder(SAEConfig(5, 11, input_norm="none"))
    sae.fit_to(30 * inputs(200))
    assert sae.scale == 1


@every_recipe
def test_token_norm_gives_each_vector_the_norm_of_the_width(recipe):
    """Loss and reconstruction are those of vectors divided by their own norm, times sqrt(n), and multiplied back."""
    sae, x = make(recipe, input_norm="token"), inputs(9) * torch.logspace(-3, 3, 9).double()[:, None]
    own = np.sqrt(5) / np.linalg.norm(x.numpy(), axis=1, keepdims=True)                     # scale of each vector
    expected = reference(parameters(sae), 1.0, x.numpy() * own, 0.8, recipe)
    assert_close(sae.encode(x), expected.f, 1e-6)
    np.testing.assert_allclose(sae(x).detach().numpy() * own, expected.x_hat, atol=1e-5)
    assert sae.loss(x, 0.8)[0].item() == pytest.approx(expected.loss, rel=1e-6)


@pytest.mark.parametrize("input_norm", ["dataset", "token", "none"])
@every_recipe
def test_only_towards_starts_b_dec_at_the_geometric_median_of_the_scaled_data(recipe, input_norm):
    sae, x = SparseAutoencoder(SAEConfig(3, 8, recipe, input_norm)), 4 * inputs(300, d_in=3).numpy() ** 2
    sae.fit_to(torch.from_numpy(x))
    own = {"dataset": sae.scale.item(), "token": np.sqrt(3) / np.linalg.norm(x, axis=1, keepdims=True), "none": 1.0}
    away = x * own[input_norm] - sae.b_dec.detach().numpy()
    pull = (away / np.linalg.norm(away, axis=1, keepdims=True)).mean(axis=0)               # 0 at the median only
    if recipe == "towards":
        assert np.linalg.norm(pull) < 1e-4
    else:
        assert not sae.b_dec.any()


def test_the_geometric_median_balances_the_directions_to_all_points():
    x = inputs(500, d_in=4) ** 3 + 2
    median = geometric_median(x)
    away = x - median
    assert (away / away.norm(dim=1, keepdim=True)).mean(0).norm() < 1e-4
    assert (x.mean(0) - median).norm() > 0.05       # a skewed cloud: the mean is another point


def test_the_geometric_median_stays_with_the_majority():
    x = torch.tensor([[1.0, 2.0]] * 7 + [[1e4, 0.0], [0.0, 1e4], [1e4, 1e4]])
    assert_close(geometric_median(x), np.array([1.0, 2.0]), 1e-3)


@pytest.mark.parametrize("decoder_norm", [0.05, 1.0])
@every_recipe
def test_training_starts_with_transposed_matrices_equal_norms_and_no_bias(recipe, decoder_norm):
    sae = SparseAutoencoder(SAEConfig(6, 50, recipe, decoder_norm=decoder_norm, start="transposed"))
    assert torch.equal(sae.W_enc, sae.W_dec.t())
    assert RECIPES[recipe].start == ("kaiming" if recipe == "towards" else "transposed")
    norm = decoder_norm if recipe == "scaling" else 1.0
    np.testing.assert_allclose(np.linalg.norm(parameters(sae)["W_dec"], axis=1), norm, rtol=1e-6)
    assert not sae.b_enc.any() and not sae.b_dec.any()
    assert sae.scale == 1
    cosines = parameters(sae)["W_dec"] @ parameters(sae)["W_dec"].T / norm ** 2
    assert np.abs(cosines[np.triu_indices(50, 1)].mean()) < 0.1      # random directions point all ways


def test_towards_starts_encoder_and_decoder_apart_as_pytorchs_linear_layers_do():
    """Of torch.nn.Linear itself, 64 -> 2,000 -> 64: the distribution of the entries, rows of the decoder normalised."""
    sae = SparseAutoencoder(SAEConfig(64, 2000, "towards"))
    encoder = torch.nn.Linear(64, 2000).weight.detach().double().numpy()        # (2000, 64)
    decoder = torch.nn.Linear(2000, 64).weight.detach().double().numpy().T      # (2000, 64)
    decoder /= np.linalg.norm(decoder, axis=1, keepdims=True)
    quantiles = np.linspace(0.05, 0.95, 19)
    W_enc, W_dec = parameters(sae)["W_enc"].T, parameters(sae)["W_dec"]
    for ours, theirs in ((W_enc, encoder), (W_dec, decoder)):
        expected = np.quantile(theirs, quantiles)
        np.testing.assert_allclose(np.quantile(ours, quantiles), expected, atol=0.02 * expected.max())
    assert np.abs(W_enc).max() <= 1 / 8 and not sae.b_enc.any()
    np.testing.assert_allclose(np.linalg.norm(W_dec, axis=1), 1, rtol=1e-6)
    cosines = (W_enc * W_dec).sum(1) / np.linalg.norm(W_enc, axis=1)
    assert abs(cosines.mean()) < 0.02               # nothing in common; transposed they would be 1


@every_recipe
def test_the_start_can_be_chosen_and_an_unknown_one_is_refused(recipe):
    kaiming = SparseAutoencoder(SAEConfig(6, 50, recipe, start="kaiming"))
    assert torch.equal(kaiming.W_enc, kaiming.W_dec.t()) == (recipe == "tied")
    with pytest.raises(UserError, match="one of transposed, kaiming"):
        SAEConfig(6, 50, recipe, start="xavier")


def test_lambda_in_the_papers_units_weighs_the_same_two_terms():
    """Their loss, on raw activations: the squared error's mean over the elements, and lambda times the sum of f."""
    sae, x = make("towards", scale=0.7), inputs(9)
    theirs = paper_lambda(3.0, 5, 0.7)
    f = sae.encode(x).detach().numpy() / 0.7                                # raw: what is added up to x_hat
    raw = ((sae(x).detach().numpy() - x.numpy()) ** 2).mean(1) + theirs * f.sum(1)
    assert sae.loss(x, 3.0)[0].item() == pytest.approx(5 * 0.7 ** 2 * raw.mean(), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_found_anywhere(dtype, value):
    rows = torch.full((5, 7), torch.finfo(dtype).max, dtype=dtype)
    assert all_finite(rows) and all_finite(-rows)
    for place in (0, 17, 34):
        spoiled = rows.clone()
        spoiled.view(-1)[place] = value
        assert not all_finite(spoiled)


def test_the_share_of_the_largest_rows():
    x = torch.ones(1000, 4)
    assert massive_share(x) == pytest.approx(0.01)
    x[::100] *= 50                                  # 10 rows of 2,500 times the squared norm
    assert massive_share(x) == pytest.approx(25000 / (25000 + 990)) and massive_share(x[:1]) == 1
    assert massive_share(x * 1e18) == pytest.approx(massive_share(x))


def test_tied_has_one_matrix_and_no_decoder_bias():
    sae = make("tied")
    assert {name for name, _ in sae.named_parameters()} == {"W_dec", "b_enc"}
    assert torch.equal(sae.W_enc, sae.W_dec.t())    # of random weights here: W_enc follows W_dec
    assert not sae.b_dec.any()


def test_an_unknown_recipe_is_refused():
    with pytest.raises(UserError, match="unscaling"):
        SparseAutoencoder(SAEConfig(5, 11, "unscaling"))


# -----------------------------------------------------------------------------
# checkpoints

class RunsCode:
    """Creates the file `path` when it is unpickled."""
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("input_norm", ["dataset", "token"])
@every_recipe
def test_load_gives_back_exactly_what_save_wrote(tmp_path, recipe, input_norm):
    sae, path = make(recipe, scale=1 / 3, input_norm=input_norm).float(), tmp_path / "sae.pt"
    save_sae(path, sae, step=12, site="mlp.0", history=[1.5, None], silent=torch.arange(11))
    loaded = load_sae(path, "cpu")
    assert loaded.config == sae.config
    config = loaded.config
    assert (config.d_in, config.n_features, config.recipe, config.input_norm) == (5, 11, recipe, input_norm)
    assert torch.equal(loaded.scale, sae.scale)
    assert loaded.state_dict().keys() == sae.state_dict().keys()
    for name, value in sae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    x = inputs(4).float()
    assert torch.equal(loaded(x), sae(x))
    assert torch.equal(loaded.extra.pop("silent"), torch.arange(11))
    assert loaded.extra == {"step": 12, "site": "mlp.0", "history": [1.5, None]}
    assert [p.name for p in tmp_path.iterdir()] == ["sae.pt"]


def test_a_save_that_fails_leaves_the_old_file(tmp_path):
    sae, path = make("scaling").float(), tmp_path / "sae.pt"
    save_sae(path, sae, step=1)
    with pytest.raises(Exception, match="pickle|local object"):
        save_sae(path, sae, step=2, unpicklable=lambda: None)
    assert load_sae(path).extra == {"step": 1}


def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path):
    path, trap = tmp_path / "sae.pt", tmp_path / "code_was_run"
    save_sae(path, make("scaling").float(), step=RunsCode(trap))
    with pytest.raises(UserError, match=re.escape(str(path))):
        load_sae(path)
    assert not trap.exists()
    torch.load(path, weights_only=False)
    assert trap.exists()                            # so the trap works


def save_changed(path, weights=None, **config):
    save_sae(path, make("scaling").float())
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["config"] |= config
    torch.save(checkpoint | ({"weights": weights} if weights else {}), path)


FOREIGN_FILES = {
    "missing": lambda path: None,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("these are no weights\n"),
    "truncated": lambda path: (save_changed(path), path.write_bytes(path.read_bytes()[:-1000])),
    "another dict": lambda path: torch.save({"model": {}, "config": {}}, path),
    "a tensor": lambda path: torch.save(torch.ones(3), path),
    "another width": lambda path: save_changed(path, d_in=6),
    "another recipe": lambda path: save_changed(path, recipe="tied", tied=True),
    "an unknown recipe": lambda path: save_changed(path, recipe="unscaling"),
    "weights of another kind": lambda path: save_changed(path, weights=[1, 2]),
}


@pytest.mark.parametrize("kind", FOREIGN_FILES)
def test_a_foreign_checkpoint_is_refused_by_name(tmp_path, kind):
    path = tmp_path / "sae.pt"
    FOREIGN_FILES[kind](path)
    with pytest.raises(UserError, match=re.escape(str(path))):
        load_sae(path)


# -----------------------------------------------------------------------------
# activations on disk

LENGTHS = (23, 1, 40)
ROWS = sum(LENGTHS)


@pytest.fixture
def paths(tmp_path, monkeypatch):
    """Three files of 64 rows (i, -i, i / 2), i = 0 .. 63, of three precisions, read in slices of 1 to 14 rows."""
    monkeypatch.setattr(ActivationStore, "SLICE_BYTES", 7 * 3 * 4 + 1)
    return write_rows(tmp_path, LENGTHS)


def write_rows(folder, lengths):
    i, paths = np.arange(sum(lengths))[:, None], []
    rows = np.split(np.concatenate([i, -i, i / 2], axis=1), np.cumsum(lengths)[:-1])
    for part, dtype in zip(rows, (np.float16, np.float64, np.float32)):
        paths.append(folder / f"train-{len(paths):03}.npy")
        np.save(paths[-1], part.astype(dtype))
    return paths


def ids(rows):
    """Which rows these are; their other entries are checked on the way."""
    first = rows[:, 0].double()
    assert torch.equal(rows.double(), torch.stack([first, -first, first / 2], dim=1))
    return first.int().tolist()


def read(store, total, sizes):
    """The first `total` rows of the stream, in batches of the given sizes again and again."""
    found, position = [], 0
    while position < total:
        n = sizes[position % len(sizes)]
        batch = store.batch(position, n)
        assert batch.shape == (n, 3) and batch.dtype == torch.float32
        found += ids(batch)
        position += n
    return found[:total]


@pytest.mark.parametrize("sizes", [(1,), (5, 13, 2), (63,), (65,), (200,)], ids=str)
@pytest.mark.parametrize("slice_rows", [1, 7, 1000])
def test_an_epoch_visits_every_row_once_whatever_the_batches_and_slices(paths, monkeypatch, sizes, slice_rows):
    monkeypatch.setattr(ActivationStore, "SLICE_BYTES", slice_rows * 3 * 4 + 1)
    store = ActivationStore(paths, seed=3)
    assert (store.rows, store.width) == (ROWS, 3)
    stream = read(store, 3 * ROWS, sizes)
    epochs = np.reshape(stream, (3, ROWS))
    for epoch in epochs:
        assert sorted(epoch) == list(range(ROWS))
    for one, other in [(0, 1), (1, 2), (0, 2)]:     # another order each time: hardly a row keeps its place
        assert np.mean(epochs[one] == epochs[other]) < 0.2


@pytest.mark.parametrize("slice_bytes", [2 * 3, 1000], ids=["slices of one row", "one slice"])
def test_slices_are_shuffled_and_so_are_the_rows_within(tmp_path, monkeypatch, slice_bytes):
    monkeypatch.setattr(ActivationStore, "SLICE_BYTES", slice_bytes)
    store = ActivationStore(write_rows(tmp_path, (50,)))
    for epoch in (ids(store.batch(0, 50)), ids(store.batch(50, 50))):
        assert np.mean(np.diff(epoch) == 1) < 0.2   # share of rows that follow their neighbour in the file
    assert np.mean(np.equal(ids(store.batch(0, 50)), ids(store.batch(50, 50)))) < 0.2


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs /proc")
def test_a_store_keeps_no_file_open(tmp_path):
    paths, before = write_rows(tmp_path, (5, 5, 5)), len(os.listdir("/proc/self/fd"))
    store = ActivationStore(paths)
    store.batch(0, 12)
    assert store.rows == 15 and len(os.listdir("/proc/self/fd")) == before


def test_the_seed_decides_the_order(paths):
    order = read(ActivationStore(paths, seed=3), ROWS, (9,))
    assert read(ActivationStore(paths, seed=3), ROWS, (4, 31)) == order
    assert read(ActivationStore(paths, seed=4), ROWS, (9,)) != order


@pytest.mark.parametrize("slice_bytes", [100, 10_000], ids=["many slices", "a slice a file"])
def test_a_batch_depends_on_its_position_and_not_on_what_was_read_before(paths, monkeypatch, slice_bytes):
    monkeypatch.setattr(ActivationStore, "SLICE_BYTES", slice_bytes)
    used, stream = ActivationStore(paths, seed=3), read(ActivationStore(paths, seed=3), 3 * ROWS, (11,))
    for position, n in [(100, 20), (0, 5), (37, 50), (130, 1), (5, 130), (37, 50), (64, 1), (63, 1), (191, 1), (0, 1)]:
        expected = stream[position:position + n]
        assert ids(used.batch(position, n)) == expected
        assert ids(ActivationStore(paths, seed=3).batch(position, n)) == expected


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["f2", "f4", "f8"])
def test_a_gpu_gets_the_rows_in_the_order_of_the_cpu_and_refuses_the_same(tmp_path, monkeypatch, kind, order):
    """The path of a GPU, on the CPU: whole slices are sent, shuffled and checked afterwards."""
    sent = []

    def to_device(array, device):
        sent.append(array.dtype)
        return torch.from_numpy(np.array(array))

    monkeypatch.setattr("sae.to_device", to_device)
    monkeypatch.setattr(ActivationStore, "SLICE_BYTES", 7 * 3 * 4 + 1)
    np.save(tmp_path / "a.npy", np.arange(90).reshape(30, 3).astype(order + kind))
    gpu = SimpleNamespace(type="cuda")
    store, on_gpu = (ActivationStore([tmp_path / "a.npy"], seed=2, **more) for more in ({}, {"device": gpu}))
    for position in range(0, 80, 16):
        assert torch.equal(store.batch(position, 16), on_gpu.batch(position, 16))
    assert set(sent) == {np.dtype("f2" if kind == "f2" else "f4"), np.dtype(np.int64)}  # float16 as it is
    np.save(tmp_path / "a.npy", np.full((30, 3), np.inf).astype(order + kind))
    with pytest.raises(UserError, match="a.npy holds NaN, infinity"):
        on_gpu.batch(0, 1)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_share_a_batch_and_change_slices_together(paths, ranks):
    expected = read(ActivationStore(paths, seed=3), 3 * ROWS, (12,))
    stores = [ActivationStore(paths, seed=3) for _ in range(ranks)]
    for position in range(0, 2 * ROWS, 12):
        shares = [store.batch(position, 12, rank, ranks) for rank, store in enumerate(stores)]
        assert {len(share) for share in shares} == {12 // ranks}
        assert ids(torch.cat(shares)) == expected[position:position + 12]
        assert len({store.loaded_slice for store in stores}) == 1


def test_a_batch_may_be_written_to(paths):
    store = ActivationStore(paths)
    order = ids(store.batch(0, 5))
    store.batch(0, 5).zero_()
    assert ids(store.batch(0, 5)) == order


@pytest.mark.parametrize("cuts", [(0.9,), (1 / 3, 0.37, 0.5), (0.1, 0.95)], ids=str)
def test_parts_share_no_row_and_leave_none_out(paths, cuts):
    edges = (0.0, *cuts, 1.0)
    found = []
    for part in zip(edges, edges[1:]):
        store = ActivationStore(paths, part=part)
        assert store.rows == pytest.approx((part[1] - part[0]) * ROWS, abs=1)
        rows = ids(store.batch(0, store.rows))
        assert sorted(rows) == sorted(ids(store.sample(store.rows, seed=0)))
        found += rows
    assert sorted(found) == list(range(ROWS))


def test_a_sample_repeats_no_row_and_comes_evenly_from_all(paths):
    store, counts = ActivationStore(paths), np.zeros(ROWS)
    for seed in range(100):
        rows = ids(store.sample(16, seed))
        assert len(rows) == len(set(rows)) == 16
        counts[rows] += 1
    assert counts.min() > 8 and counts.max() < 45   # 25 each expected, standard deviation 4.3
    assert ids(store.sample(16, 7)) == ids(store.sample(16, 7)) != ids(store.sample(16, 8))
    assert sorted(ids(store.sample(ROWS + 1, 0))) == list(range(ROWS))


def test_a_sample_keeps_the_precision_of_its_file(tmp_path):
    assert ActivationStore(write_rows(tmp_path, (50,))).sample(10, 0).dtype == torch.float16


GOOD = np.ones((6, 3), dtype=np.float16)
BAD_ARRAYS = {
    "integers": np.ones((6, 3), dtype=np.int64),
    "complex numbers": np.ones((6, 3), dtype=np.complex64),
    "bfloat16": np.ones((6, 3), dtype="V2"),
    "one dimension": np.ones(6),
    "three dimensions of another width": np.ones((6, 3, 2)),
    "quadruple precision": np.ones((6, 3), dtype=np.longdouble),
    "no rows": np.ones((0, 3)),
    "another width": np.ones((6, 4)),
    "NaN": np.where(np.arange(18).reshape(6, 3) == 17, np.nan, 1.0),
    "infinity in float16": np.where(np.arange(18).reshape(6, 3) == 3, -np.inf, GOOD),
}


@pytest.mark.parametrize("kind", BAD_ARRAYS)
def test_an_array_that_cannot_be_trained_on_is_refused_by_name(tmp_path, kind):
    good, bad = tmp_path / "good.npy", tmp_path / "bad.npy"
    np.save(good, GOOD)
    np.save(bad, BAD_ARRAYS[kind])
    for use in (lambda store: store.batch(0, 12), lambda store: store.sample(12, 0)):
        with pytest.raises(UserError, match=re.escape(str(bad))):
            use(ActivationStore([good, bad]))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["f2", "f4", "f8"])
def test_either_byte_order_is_read(tmp_path, kind, order):
    rows = np.arange(60).reshape(20, 3).astype(order + kind)
    np.save(tmp_path / "a.npy", rows)
    store = ActivationStore([tmp_path / "a.npy"])
    for read_rows in (store.batch(0, 20), store.sample(20, 0)):
        assert sorted(read_rows.tolist()) == rows.tolist()
    assert store.sample(3, 0).dtype == {"f2": torch.float16, "f4": torch.float32, "f8": torch.float32}[kind]


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(4, 5, 3), (2, 2, 5, 3), (20, 3)], ids=str)
def test_what_has_more_dimensions_is_read_as_rows_along_the_last(tmp_path, monkeypatch, shape, order):
    monkeypatch.setattr(ActivationStore, "SLICE_BYTES", 7 * 3 * 4 + 1)
    rows = np.arange(60.0, dtype=np.float32).reshape(20, 3)
    np.save(tmp_path / "a.npy", np.asarray(rows.reshape(shape), order=order))
    store = ActivationStore([tmp_path / "a.npy"], part=(0.25, 1))
    assert (store.rows, store.width) == (15, 3)
    assert sorted(store.batch(0, 15).tolist()) == rows[5:].tolist()


BAD_FILES = {
    "missing": lambda path: None,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("0.5 1.5\n"),
    "a folder": lambda path: path.mkdir(),
    "truncated": lambda path: (np.save(path, GOOD), path.write_bytes(path.read_bytes()[:-1])),
    "a truncated header": lambda path: (np.save(path, GOOD), path.write_bytes(path.read_bytes()[:40])),
    "an archive": lambda path: np.savez(path.open("wb"), GOOD),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_file_that_is_no_npy_is_refused_by_name(tmp_path, kind):
    path = tmp_path / "train-000.npy"
    BAD_FILES[kind](path)
    with pytest.raises(UserError, match=re.escape(str(path))):
        ActivationStore([path])


def test_objects_in_an_npy_file_are_refused_and_their_code_not_run(tmp_path):
    path, trap = tmp_path / "train-000.npy", tmp_path / "code_was_run"
    np.save(path, np.array([[RunsCode(trap)]], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=re.escape(str(path))):
        ActivationStore([path])
    assert not trap.exists()
    np.load(path, allow_pickle=True)
    assert trap.exists()                            # so the trap works
