"""Ways of writing that one random variable depends on another, each a small model.

Every model takes no arguments. Of each it is known how it should be treated: "exact" (closed form),
"enumerated" (a discrete latent, summed over), "sampled" (gradients of draws),
"score" (a continuous latent leaves torch: no gradient flows, and the score function takes over).
"""

from __future__ import annotations

import concurrent.futures
import copy
import dataclasses
import functools
import io
import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule, PyroSample
from torch import nn
from torch.utils.checkpoint import checkpoint


class Idiom(NamedTuple):
    name: str
    model: Callable
    how: str


IDIOMS: list[Idiom] = []
Y = torch.tensor([1.2, -0.4, 2.1], dtype=torch.float64)
NOISE = 0.5


def idiom(how: str) -> Callable:
    def add(model: Callable) -> Callable:
        IDIOMS.append(Idiom(model.__name__, model, how))
        return model

    return add


def z_site(name: str = "z", shape: tuple[int, ...] = ()) -> torch.Tensor:
    prior = dist.Normal(torch.full(shape, 0.3), 1.5)
    return pyro.sample(name, prior.to_event(len(shape)))


def observe(loc: Any) -> None:
    """Three observations around loc, which is a number or has three entries."""
    if isinstance(loc, torch.Tensor) and loc.dim() == 1 and loc.shape[0] == 3:
        pyro.sample("x", dist.Normal(loc, NOISE).to_event(1), obs=Y)
    else:
        for i in range(3):
            pyro.sample(f"x{i}", dist.Normal(loc, NOISE), obs=Y[i])


# -- writes into tensors -------------------------------------------------------------------------------------


@idiom("exact")
def setitem():
    x = torch.zeros(3)
    x[1] = z_site()
    observe(x)


@idiom("exact")
def setitem_slice():
    x = torch.ones(3)
    x[1:] = z_site(shape=(2,))
    observe(x)


@idiom("exact")
def setitem_boolean_mask():
    x = torch.ones(3)
    x[torch.tensor([True, False, True])] = 2 * z_site()
    observe(x)


@idiom("exact")
def setitem_augmented():
    x = torch.ones(2, 3)
    x[0] += z_site()
    x[1] *= 3.0
    observe(x[0] + x[1])


@idiom("exact")
def setitem_twice():
    x = torch.zeros(3)
    a, b = z_site("a"), z_site("b")
    for i, value in enumerate([a, b, a]):
        x[i] = value
    observe(x)


@idiom("exact")
def setitem_overwritten():
    x = torch.zeros(3)
    a, b = z_site("a"), z_site("b")
    x[0] = a
    x[1] = a
    x[0] = b
    observe(x)


@idiom("exact")
def index_put():
    x = torch.zeros(3)
    x.index_put_((torch.tensor([0, 2]),), z_site(shape=(2,)), accumulate=True)
    observe(x)


@idiom("exact")
def out_argument():
    x = torch.empty(3)
    torch.mul(z_site(), torch.tensor([1.0, 2.0, 3.0]), out=x)
    observe(x)


@idiom("exact")
def out_argument_of_a_view():
    x = torch.zeros(2, 3)
    torch.mul(z_site(), torch.tensor([1.0, 2.0, 3.0]), out=x[0])
    observe(x.sum(0))


@idiom("exact")
def add_():
    x = torch.zeros(3)
    x.add_(z_site(), alpha=2.0)
    observe(x)


@idiom("exact")
def copy_():
    x = torch.zeros(3)
    x.copy_(z_site(shape=(3,)))
    observe(x)


@idiom("exact")
def fill_():
    x = torch.zeros(3)
    x.fill_(z_site())
    observe(x)


@idiom("exact")
def masked_fill_():
    x = torch.zeros(3)
    x.masked_fill_(torch.tensor([True, False, True]), z_site())
    observe(x)


@idiom("exact")
def scatter_add_():
    x = torch.zeros(3)
    x.scatter_add_(0, torch.tensor([0, 0, 2]), z_site(shape=(3,)))
    observe(x)


@idiom("exact")
def index_add_():
    x = torch.ones(3)
    x.index_add_(0, torch.tensor([2, 1]), z_site(shape=(2,)))
    observe(x)


@idiom("exact")
def write_through_a_view():
    x = torch.zeros(3)
    tail = x[1:]
    tail.copy_(z_site(shape=(2,)))
    observe(x)


@idiom("exact")
def write_through_a_reshaped_view():
    x = torch.zeros(1, 3)
    x.view(-1)[2] = z_site()
    observe(x[0])


@idiom("exact")
def write_through_a_view_of_a_view():
    x = torch.zeros(2, 3)
    row = x[1]
    row[1:].add_(z_site())
    observe(x.sum(0))


@idiom("exact")
def write_into_an_unbound_row():
    x = torch.zeros(3)
    first, _, last = x.unbind()
    z = z_site()
    first.add_(z)
    last.sub_(z)
    observe(x)


@idiom("exact")
def read_through_an_older_view():
    x = torch.zeros(3)
    view = x.view(3, 1)
    x[0] = z_site()
    observe(view[:, 0])


@idiom("exact")
def write_into_data_attribute():
    x = torch.zeros(3)
    x.data[0] = z_site()
    observe(x)


@idiom("exact")
def write_into_a_clone_of_the_latent():
    z = z_site(shape=(3,)).clone()
    z[0] = 1.0
    z.mul_(2.0)
    observe(z)


@idiom("exact")
def write_into_a_view_of_the_latents_clone():
    z = z_site(shape=(3,)).clone()
    z[1:].mul_(2.0)
    observe(z)


@idiom("exact")
def write_between_two_reads():
    x = torch.zeros(3)
    before = x * 1.0
    x += z_site()
    observe(before + 2 * x)


# -- departures from torch -----------------------------------------------------------------------------------


@idiom("exact")
def torch_tensor_of_latents():
    observe(torch.tensor([z_site("a"), z_site("b"), 1.0]))


@idiom("exact")
def torch_stack_of_latents():
    observe(torch.stack([z_site("a"), z_site("b"), torch.tensor(1.0)]))


@idiom("score")
def item():
    observe(2.0 * z_site().item())


@idiom("score")
def numpy_array():
    observe(torch.as_tensor(z_site().numpy() * np.array([1.0, 2.0, 3.0])))


@idiom("score")
def detach_numpy():
    observe(torch.from_numpy(np.asarray(z_site(shape=(3,)).detach().cpu().numpy())))


@idiom("score")
def numpy_function():
    observe(torch.tensor(float(np.add(z_site(), 1.0))))


@idiom("score")
def numpy_shared_memory():
    array = np.zeros(3)
    torch.from_numpy(array)[0] = z_site()
    observe(torch.tensor(array))


@idiom("score")
def float_of():
    observe(float(z_site()) + 1.0)


@idiom("score")
def tolist():
    observe(torch.tensor([2.0 * value for value in z_site(shape=(3,)).tolist()]))


@idiom("score")
def through_a_string():
    observe(float(f"{z_site().item():.17g}"))


@idiom("score")
def math_function():
    observe(math.fma(z_site(), 2.0, 1.0) if hasattr(math, "fma") else math.fsum([z_site(), 1.0]))


@idiom("score")
def through_a_float_cache():
    @functools.lru_cache
    def double(value: float) -> float:
        return 2 * value

    observe(double(z_site().item()))


@idiom("score")
def legacy_constructor():
    observe(torch.DoubleTensor([z_site().item()] * 3))


@idiom("exact")
def new_tensor():
    observe(torch.zeros(()).new_tensor(z_site()))


@idiom("exact")
def torch_full():
    observe(torch.full((3,), 1.0) * z_site() + torch.zeros(3).fill_(0.5))


@idiom("score")
def torch_full_of_an_item():
    observe(torch.full((3,), z_site().item()))


@idiom("exact")
def torch_full_of_the_latent():
    observe(torch.full((3,), z_site()))


@idiom("exact")
def unpacked():
    a, b = z_site(shape=(2,))
    observe(a - 2 * b)


@idiom("exact")
def builtin_sum():
    observe(sum([z_site("a"), z_site("b"), 1.0]))


@idiom("sampled")
def round_trip_of_dtypes():
    observe((z_site().float() * 2).double())


@idiom("exact")
def deep_copied():
    observe(2 * copy.deepcopy(z_site()))


@idiom("score")
def shallow_copied():
    observe(2 * copy.copy(z_site()))


@idiom("score")
def pickled():
    observe(2 * pickle.loads(pickle.dumps(z_site())))


@idiom("score")
def saved_and_loaded():
    buffer = io.BytesIO()
    torch.save(z_site(), buffer)
    buffer.seek(0)
    observe(torch.load(buffer))


@idiom("exact")
def applied_elementwise():
    observe(z_site(shape=(3,)).clone().apply_(lambda value: 2 * value))


# -- discrete latents that leave torch -----------------------------------------------------------------------


def k_site() -> torch.Tensor:
    return pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.5, 0.3])))


@idiom("enumerated")
def gather_by_a_latent():
    observe(torch.tensor([-0.5, 0.3, 0.8])[k_site()])


@idiom("enumerated")
def list_at_int():
    observe([-0.5, 0.3, 0.8][int(k_site())])


@idiom("enumerated")
def list_at_index():
    observe([-0.5, 0.3, 0.8][k_site()])


@idiom("enumerated")
def range_of_a_latent():
    loc = torch.zeros(())
    for _ in range(int(k_site())):
        loc = loc + 0.6
    observe(loc)


@idiom("enumerated")
def dict_at_item():
    observe({0: -0.5, 1: 0.3, 2: 0.8}[k_site().item()])


@idiom("enumerated")
def python_if_on_a_state():
    observe(torch.tensor(0.8) if k_site() == 1 else torch.tensor(0.2))


@idiom("enumerated")
def match_on_a_state():
    match int(k_site()):
        case 0:
            observe(-0.5)
        case 1:
            observe(0.3)
        case _:
            observe(0.8)


@idiom("enumerated")
def while_below_a_latent():
    k, n = k_site(), 0
    while n < k:
        n += 1
    observe(0.5 * n)


@idiom("enumerated")
def one_hot_by_write():
    x = torch.zeros(3)
    x[k_site()] = 1.0
    observe(x)


@idiom("enumerated")
def latent_in_the_mask():
    on = pyro.sample("on", dist.Bernoulli(torch.tensor(0.4)))
    with poutine.mask(mask=on.bool()):
        pyro.sample("x", dist.Normal(torch.tensor(0.0), 1.0), obs=Y[0])


@idiom("enumerated")
def latent_in_the_distributions_mask():
    on = pyro.sample("on", dist.Bernoulli(torch.tensor(0.4)))
    pyro.sample("x", dist.Normal(torch.tensor(0.0), 1.0).mask(on.bool()), obs=Y[0])


@idiom("enumerated")
def latent_in_the_scale():
    k = k_site()
    with poutine.scale(scale=1.0 + k):
        pyro.sample("x", dist.Normal(torch.tensor(0.0), 1.0), obs=Y[0])


@idiom("enumerated")
def choice_of_the_distribution():
    on = pyro.sample("on", dist.Bernoulli(torch.tensor(0.4)))
    d = dist.Normal(torch.tensor(0.0), 1.0) if on else dist.Laplace(torch.tensor(0.0), 1.0)
    pyro.sample("x", d, obs=Y[2])


# -- statements and handlers ---------------------------------------------------------------------------------


@idiom("exact")
def latent_in_obs():
    z = z_site()
    pyro.sample("x", dist.Normal(torch.zeros(3), NOISE).to_event(1), obs=Y - z)


@idiom("sampled")
def latent_in_a_factor():
    z = z_site()
    pyro.factor("x", -0.5 * ((Y - z) / NOISE).square().sum())


@idiom("sampled")
def unit_normal_factor():
    z = z_site()
    pyro.sample("x", dist.Unit(-0.5 * ((Y - z) / NOISE).square().sum()), obs=torch.empty(0))


@idiom("exact")
def deterministic():
    observe(pyro.deterministic("d", 2 * z_site() + 1))


@idiom("exact")
def delta_site():
    observe(pyro.sample("d", dist.Delta(2 * z_site() + 1)))


def _inner() -> torch.Tensor:
    z = z_site()
    return pyro.sample("y", dist.Normal(z, 1.0))


@idiom("exact")
def conditioned():
    observe(poutine.condition(_inner, data={"y": torch.tensor(2.0)})() + z_site("b"))


@idiom("exact")
def conditioned_on_a_latent():
    b = z_site("b")
    poutine.condition(_inner, data={"y": b + 1.0})()
    observe(b)


@idiom("exact")
def substituted():
    b = z_site("b")
    observe(poutine.substitute(_inner, data={"y": 2 * b})() - b)


@idiom("exact")
def do():
    b = z_site("b")
    observe(poutine.do(_inner, data={"y": 2 * b})() - b)


@idiom("exact")
def lifted():
    def inner() -> torch.Tensor:
        return pyro.param("theta", torch.tensor(0.5))

    observe(poutine.lift(inner, prior={"theta": dist.Normal(torch.tensor(0.0), 1.0)})())


@idiom("exact")
def reparameterised():
    config = {"y": LocScaleReparam(centered=0.0)}
    observe(poutine.reparam(_inner, config=config)())


@idiom("exact")
def observed_inside_a_block():
    z = z_site()
    with poutine.block(hide=["hidden"]):
        pyro.sample("hidden", dist.Normal(z, 1.0), obs=torch.tensor(5.0))  # a block hides: no factor, as under SVI
    observe(z)


@idiom("exact")
def scaled():
    z = z_site()
    with poutine.scale(scale=0.3):
        observe(z)


@idiom("exact")
def masked():
    z = z_site(shape=(3,))
    with pyro.plate("n", 3), poutine.mask(mask=torch.tensor([True, False, True])):
        pyro.sample("x", dist.Normal(z, NOISE), obs=torch.tensor([1.2, float("nan"), 2.1]))


@idiom("exact")
def trace_inside_the_model():
    trace = poutine.trace(z_site).get_trace()
    observe(trace.nodes["z"]["value"] * 2)


@idiom("exact")
def replayed_inside_the_model():
    inner = poutine.trace(
        poutine.block(lambda: pyro.sample("w", dist.Delta(z_site("b") * 2)), expose=["b"])
    ).get_trace()
    del inner
    observe(z_site())


@idiom("exact")
def infer_configured():
    observe(poutine.infer_config(z_site, config_fn=lambda site: {})() + 1.0)


@idiom("exact")
def markov():
    x = torch.tensor(0.0)
    for i in pyro.markov(range(3)):
        x = pyro.sample(f"s{i}", dist.Normal(0.5 * x, 1.0))
        pyro.sample(f"x{i}", dist.Normal(x, NOISE), obs=Y[i])


@idiom("exact")
def sequential_plate():
    z = z_site()
    for i in pyro.plate("n", 3):
        b = pyro.sample(f"b{i}", dist.Normal(z, 1.0))
        pyro.sample(f"x{i}", dist.Normal(b, NOISE), obs=Y[i])


@idiom("exact")
def vectorised_plate():
    z = z_site()
    with pyro.plate("n", 3):
        pyro.sample("x", dist.Normal(z, NOISE), obs=Y)


@idiom("exact")
def data_indexed_by_the_plate():
    z = z_site(shape=(2,))
    group = torch.tensor([0, 1, 1])
    with pyro.plate("n", 3) as index:
        pyro.sample("x", dist.Normal(z[group[index]], NOISE), obs=Y[index])


# -- functions of functions ----------------------------------------------------------------------------------


@idiom("sampled")
def vmapped():
    observe(torch.func.vmap(lambda c, z: c * z, in_dims=(0, None))(torch.tensor([1.0, 2.0, 3.0]), z_site()))


@idiom("sampled")
def vmapped_over_a_closure():
    z = z_site()
    observe(torch.func.vmap(lambda c: c * z)(torch.tensor([1.0, 2.0, 3.0])))


@idiom("sampled")
def vmapped_over_the_latent():
    observe(torch.func.vmap(lambda z: 2 * z + 1)(z_site(shape=(3,))))


@idiom("sampled")
def gradient_in_the_model():
    observe(torch.func.grad(lambda u: (u**2).sum())(z_site(shape=(3,))))


@idiom("sampled")
def gradient_over_a_closure():
    z = z_site()
    observe(torch.func.grad(lambda u: (u * z).sum())(torch.ones(3)))


@idiom("sampled")
def jvp_in_the_model():
    z = z_site()
    observe(torch.func.jvp(lambda u: 3 * u, (torch.ones(()),), (z,))[1])


@idiom("sampled")
def jacrev_in_the_model():
    z = z_site()
    observe(torch.func.jacrev(lambda u: z * u)(torch.ones(3)).diagonal())


@idiom("sampled")
def autograd_in_the_model():
    with torch.enable_grad():
        u = torch.ones(3, requires_grad=True)
        (g,) = torch.autograd.grad((u * z_site()).sum(), u, create_graph=True)
    observe(g)


@idiom("exact")
def without_gradients():
    with torch.no_grad():
        loc = 2 * z_site() + 1
    observe(loc)


@idiom("exact")
def in_inference_mode():
    with torch.inference_mode():
        loc = 2 * z_site() + 1
        observe(loc)


@idiom("exact")
def detached():
    observe(2 * z_site().detach())


@idiom("exact")
def data_attribute():
    observe(2 * z_site().data)


@idiom("exact")
def checkpointed():
    observe(checkpoint(lambda z: 2 * z + 1, z_site(), use_reentrant=False))


@idiom("exact")
def checkpointed_reentrant():
    observe(checkpoint(lambda z: 2 * z + 1, z_site().requires_grad_(), use_reentrant=True))


@idiom("exact")
def where():
    observe(torch.where(torch.tensor([True, False, True]), z_site("a"), z_site("b")))


@torch.jit.script
def scripted_line(z, slope: float):
    return slope * z + 1.0


@idiom("sampled")
def scripted():
    observe(scripted_line(z_site(), 2.0))


def line_to_trace(z):
    return 2.0 * z + 1.0


traced_line = torch.jit.trace(line_to_trace, (torch.zeros((), dtype=torch.float64),))


@idiom("sampled")
def jit_traced():
    observe(traced_line(z_site()))


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        return 2 * z

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


@idiom("exact")
def autograd_function():
    observe(Doubled.apply(z_site()) + 1.0)


@idiom("exact")
def tensor_method_on_the_class():
    observe(torch.Tensor.add(torch.Tensor.mul(z_site(), 2), 1))


@idiom("exact")
def aten_operator():
    observe(torch.ops.aten.mul(z_site(), 2.0))


# -- modules -------------------------------------------------------------------------------------------------

INPUTS = torch.tensor([[1.0, 0.2], [0.3, -1.0], [0.5, 2.0]], dtype=torch.float64)


def weight_sites() -> dict[str, torch.Tensor]:
    return {"weight": z_site("weight", (1, 2)), "bias": z_site("bias", (1,))}


@idiom("exact")
def functional_call():
    module = nn.Linear(2, 1).double()
    observe(torch.func.functional_call(module, weight_sites(), (INPUTS,)).squeeze(-1))


@idiom("exact")
def functional_linear():
    weights = weight_sites()
    observe(nn.functional.linear(INPUTS, weights["weight"], weights["bias"]).squeeze(-1))


@idiom("exact")
def weights_set_on_a_module():
    module = nn.Linear(2, 1).double()
    sites = weight_sites()
    for name in ("weight", "bias"):
        delattr(module, name)
        setattr(module, name, sites[name])
    observe(module(INPUTS).squeeze(-1))


@idiom("exact")
def weights_copied_into_a_module():
    module = nn.Linear(2, 1).double()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(z_site(name, tuple(parameter.shape)))
        loc = module(INPUTS).squeeze(-1)
    observe(loc)


@idiom("exact")
def weights_set_as_data():
    module = nn.Linear(2, 1).double()
    sites = weight_sites()
    module.weight.data = sites["weight"]
    module.bias.data = sites["bias"]
    with torch.no_grad():
        loc = module(INPUTS).squeeze(-1)
    observe(loc)


@idiom("exact")
def loaded_state_dict():
    module = nn.Linear(2, 1).double()
    module.load_state_dict(weight_sites())
    with torch.no_grad():
        loc = module(INPUTS).squeeze(-1)
    observe(loc)


class Regression(PyroModule):
    def __init__(self):
        super().__init__()
        self.linear = PyroModule[nn.Linear](2, 1)
        self.linear.weight = PyroSample(
            dist.Normal(torch.zeros((), dtype=torch.float64), 1.0).expand([1, 2]).to_event(2)
        )
        self.linear.bias = PyroSample(dist.Normal(torch.zeros((), dtype=torch.float64), 1.0).expand([1]).to_event(1))

    def forward(self):
        observe(self.linear(INPUTS).squeeze(-1))


IDIOMS.append(Idiom("pyro_module", Regression(), "exact"))


@idiom("exact")
def random_module():
    module = nn.Linear(2, 1).double()
    priors = {
        "weight": dist.Normal(torch.zeros(1, 2), 1.0).to_event(2),
        "bias": dist.Normal(torch.zeros(1), 1.0).to_event(1),
    }
    lifted_module = pyro.random_module("net", module, priors)
    observe(lifted_module()(INPUTS).squeeze(-1))


# -- where Python keeps it -----------------------------------------------------------------------------------


class Pair(NamedTuple):
    first: Any
    second: Any


@dataclasses.dataclass
class Box:
    value: Any

    @property
    def doubled(self) -> Any:
        return 2 * self.value


class Shelf:
    current: Any = None


SHELF: dict[str, Any] = {}


@idiom("exact")
def in_a_list():
    items = [z_site("a")]
    items.append(items[-1] + 1.0)
    observe(items[1])


@idiom("exact")
def in_a_named_tuple():
    pair = Pair(z_site("a"), z_site("b"))
    observe(pair.first - pair.second)


@idiom("exact")
def in_a_dataclass():
    observe(Box(z_site()).doubled)


@idiom("exact")
def in_a_class_attribute():
    Shelf.current = z_site()
    try:
        observe(2 * Shelf.current)
    finally:
        Shelf.current = None


@idiom("exact")
def in_a_global():
    SHELF["z"] = z_site()
    observe(2 * SHELF.pop("z"))


@idiom("exact")
def in_a_closure():
    z = z_site()

    def line(x: torch.Tensor) -> torch.Tensor:
        return x * z

    observe(line(torch.tensor([1.0, 2.0, 3.0])))


@idiom("exact")
def in_a_generator():
    def walk():
        x = z_site()
        while True:
            yield x
            x = x + 1.0

    observe(torch.stack(list(itertools.islice(walk(), 3))))


@idiom("exact")
def in_an_exception():
    try:
        raise ValueError(z_site())
    except ValueError as error:
        observe(2 * error.args[0])


@idiom("exact")
def in_another_thread():
    z = z_site()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        observe(pool.submit(lambda: 2 * z).result())


@idiom("exact")
def written_in_another_thread():
    z, x = z_site(), torch.zeros(3)

    def write() -> None:
        x[0] = z

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(write).result()
    observe(x)


@idiom("exact")
def accumulated():
    observe(torch.stack(list(itertools.accumulate([z_site("a"), z_site("b"), torch.tensor(1.0)]))))


@idiom("exact")
def attribute_of_the_tensor():
    x = torch.zeros(3)
    x.hidden = z_site()
    observe(x + x.hidden)


# -- linear algebra ------------------------------------------------------------------------------------------


@idiom("exact")
def sparse_product():
    matrix = torch.sparse_coo_tensor(
        torch.tensor([[0, 1, 2, 2], [0, 1, 0, 1]]), torch.tensor([1.0, 2.0, 3.0, 4.0]), (3, 2)
    )
    observe(torch.sparse.mm(matrix, z_site(shape=(2, 1))).squeeze(-1))


@idiom("sampled")
def sparse_values():
    z = z_site(shape=(2,))
    matrix = torch.sparse_coo_tensor(torch.tensor([[0, 2], [0, 1]]), z, (3, 2))
    observe(matrix.to_dense().sum(-1))


@idiom("exact")
def reshaped():
    z = z_site(shape=(2, 3))
    observe(z.reshape(3, 2).permute(1, 0).unflatten(1, (3, 1)).squeeze(-1).sum(0))


@idiom("exact")
def einsum():
    observe(torch.einsum("nd,d->n", INPUTS, z_site(shape=(2,))))


@idiom("exact")
def fourier():
    observe(torch.fft.irfft(torch.fft.rfft(z_site(shape=(3,))) * 2.0, n=3))


@idiom("exact")
def convolved():
    z = z_site(shape=(5,))
    observe(nn.functional.conv1d(z[None, None], torch.tensor([[[1.0, 0.5, 0.25]]]))[0, 0])


@idiom("exact")
def solved():
    observe(torch.linalg.solve(torch.tensor([[2.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.5, 1.0]]), z_site(shape=(3,))))


@idiom("exact")
def complex_parts():
    z = torch.complex(z_site("a"), z_site("b")) * 1j
    observe(z.real - z.imag)


@idiom("exact")
def cumulative():
    observe(z_site(shape=(3,)).cumsum(0).flip(0))


@idiom("exact")
def linspace():
    observe(torch.linspace(0, 1, 3) * z_site())


@idiom("exact")
def strided():
    observe(z_site(shape=(4,)).as_strided((3,), (1,), 1))


@idiom("exact")
def wrapped_parameter():
    observe(nn.Parameter(z_site(), requires_grad=False) * 2)


@idiom("sampled")
def subclassed():
    observe(z_site().as_subclass(torch.Tensor) * 2)


@idiom("enumerated")
def one_hot_of_the_latents_own_shape():
    k = k_site()
    observe(torch.stack([(k == i).to(torch.get_default_dtype()) for i in range(3)], dim=-1))


@idiom("exact")
def input_overwritten_between_uses():
    x, z = torch.tensor([1.0, 2.0, 3.0]), z_site()
    first = x * z
    x.mul_(2.0)
    observe(first + x)


# -- joined later: what only matters in some states, and what a branch never takes ---------------------------


@idiom("exact")
def python_max_that_never_binds():
    observe(max(z_site(), torch.tensor(-50.0)))


@idiom("exact")
def while_that_ends_at_once():
    z = z_site()
    while z.abs() > 100:
        z = z / 2
    observe(2 * z)


@idiom("exact")
def assertion_on_a_latent():
    z = z_site()
    assert torch.isfinite(z)
    observe(2 * z)


@idiom("exact")
def printed():
    z = z_site()
    assert repr(z) and f"{z}"
    observe(2 * z)


@idiom("exact")
def named_results():
    """`sort`, `max` and `linalg.slogdet` return tuples with names."""
    z = z_site(shape=(2,))
    ordered = z.sort(descending=True)
    smallest = torch.min(z, dim=0)
    matrix = torch.diag(torch.tensor([2.0, 3.0]))
    observe(ordered.values[0] + smallest.values + 0 * ordered.indices.sum() + torch.linalg.slogdet(matrix).logabsdet)


@idiom("sampled")
def conditional_operator():
    observe(torch.cond(torch.tensor(True), lambda z: 2 * z, lambda z: 3 * z, (z_site(),)))


@idiom("enumerated")
def switched_in_one_state_only():
    k = pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.3, 0.1, 0.1])))
    observe(2.0 if int(k) == 3 else 0.0)


@idiom("enumerated")
def two_latents_of_which_one_matters_in_one_state():
    on = pyro.sample("on", dist.Bernoulli(torch.tensor(0.4)))
    k = k_site()
    observe([-0.5, 0.3, 0.8][int(k)] if on else 1.0)


@idiom("enumerated")
def chain_of_python_indices():
    table = [[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]]
    k = k_site()
    for i in range(2):
        k = pyro.sample(f"k{i}", dist.Categorical(torch.tensor(table[int(k)])))
    observe([-0.5, 0.3, 0.8][k])
