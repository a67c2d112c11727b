"""A model with finite sites summed out: the others as they are, and one factor log Σ_z p(z, x | θ)."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from typing import Any

import opt_einsum
import pyro
import torch
from pyro import poutine
from pyro.infer import JitTraceEnum_ELBO, TraceEnum_ELBO
from pyro.ops.contract import contract_to_tensor
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from pyro_blr.running import isolated_random_state, latent_nodes

__all__ = ["SummedOut", "marginal_of"]

_MOST = 50  # unknowns whose Hessian is formed: beyond, the loss's own gradient is cheaper


class SummedOut:
    """θ ↦ p(θ) Σ_z p(z, x | θ), z being sites with finitely many states, by Pyro's tensor variable elimination (Obermeyer et al. 2019).

    It is a Pyro model whose latents are θ: what `TraceEnum_ELBO` takes a guide of θ alone to be a guide of.
    """

    def __init__(self, model: Callable, states: Collection[str], max_plate_nesting: int):
        self.model, self.states, self.max_plate_nesting = model, frozenset(states), max_plate_nesting
        self.__name__ = getattr(model, "__name__", type(model).__name__)

    @property
    def note(self) -> str:
        """What a user should know of it."""
        return f"{', '.join(sorted(self.states))}: summed out of the model, as loss does; '_summed_out' is log p(data | the other sites)"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        def hidden(msg: Any) -> bool:
            return msg["type"] == "sample" and not isinstance(msg["fn"], _Subsample) and self._is_inner(msg)

        def options(msg: Any) -> dict[str, Any]:
            return {**msg["infer"], **({"enumerate": "parallel"} if msg["name"] in self.states else {})}

        with poutine.block(hide_fn=hidden), poutine.trace() as tracer:
            with poutine.enum(first_available_dim=-1 - self.max_plate_nesting), poutine.infer_config(config_fn=options):  # type: ignore[arg-type]
                result = self.model(*args, **kwargs)
        pyro.factor("_summed_out", self._log_marginal(tracer.trace))
        return result

    def _is_inner(self, msg: Any) -> bool:
        return msg["is_observed"] or msg["name"] in self.states

    def _log_marginal(self, trace: poutine.Trace) -> Tensor:
        """log Σ_z p(z, x | θ); the states of a masked element count in full, as they do under `TraceEnum_ELBO`."""
        with pyro.validation_enabled(False):
            trace.compute_log_prob(site_filter=lambda _, site: self._is_inner(site))
        trace.pack_tensors()
        factors: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
        states: set[str] = set()
        for name, node in trace.nodes.items():
            found: Any = node.get("packed", {})
            if "log_prob" not in found:
                continue
            if not bool(torch.as_tensor(node["scale"] == 1).all()):
                raise ValueError(f"{name} counts {node['scale']} times, and stands where states are summed out")
            table = found["unscaled_log_prob" if name in self.states else "log_prob"]
            frames: Any = node["cond_indep_stack"]
            plates = frozenset(trace.plate_to_symbol[frame.name] for frame in frames if frame.vectorized)
            factors.setdefault(plates, []).append(table)
            states |= set(table._pyro_dims)
        states -= set(trace.plate_to_symbol.values())
        with opt_einsum.shared_intermediates() as cache:
            return contract_to_tensor(factors, states, target_ordinal=frozenset(), cache=cache)


def marginal_of(model: Callable, guide: Callable, loss: Any, args: tuple, kwargs: Mapping[str, Any]) -> Callable:
    """The model without the finite sites that a guide leaves to the enumeration of its loss; the model itself where there are none, or
    where the guide has more than 50 unknowns.
    """
    if not isinstance(loss, (TraceEnum_ELBO, JitTraceEnum_ELBO)):
        return model
    with isolated_random_state(0), poutine.block(), torch.no_grad():
        of_guide = poutine.trace(guide).get_trace(*args, **kwargs)
        of_model = poutine.trace(poutine.replay(model, trace=of_guide)).get_trace(*args, **kwargs)
    nodes: Mapping[str, Any] = of_model.nodes
    latent = [name for name, _ in latent_nodes(of_model) if name not in of_guide.nodes]
    states = [name for name in latent if nodes[name]["fn"].has_enumerate_support]
    size = sum(node["value"].numel() for _, node in latent_nodes(of_guide))
    if not states or states != latent or size > _MOST:
        return model
    frames = [frame for node in nodes.values() for frame in node.get("cond_indep_stack", ()) if frame.vectorized]
    deepest = max((-frame.dim for frame in frames), default=0)
    nesting = deepest if math.isinf(loss.max_plate_nesting) else max(deepest, int(loss.max_plate_nesting))
    return SummedOut(model, states, nesting)
