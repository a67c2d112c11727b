"""Random Pyro programs, as source text, and which of their (factor, site) pairs are conjugate by
construction.

A program is written statement by statement from a table of expressions for each kind of argument.
Every choice goes through
`choose(n) -> 0 … n − 1`, so that Hypothesis, or a seeded generator, can drive it.
"""

from __future__ import annotations

import linecache
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from hypothesis import strategies as st
from pyro import poutine
from torch import Tensor

__all__ = ["Written", "programs", "seeded", "written"]

K = 2  # components
SORTS = (
    "real real real real tau tau tau variance unit unit simplex simplex vector matrix "
    "state state state bit lognormal half"
).split()
# Seen in part, a site of these sorts keeps its form: constants beside its elements are terms of a sum, or states.
# Of other sorts it is conjugate, but not found: `torch.where` is neither proportional nor equal to it.
MIXABLE = ("real", "vector", "lognormal", "state", "bit")
SHAPES: dict[str, tuple[int, ...]] = {"": (), "n": (3,), "g": (2, 1), "gn": (2, 3)}


@dataclass(frozen=True)
class Written:
    """A program and what is known of it: pairs are {(factor, site): conjugate}."""

    source: str
    pairs: dict[tuple[str, str], bool]
    features: frozenset[str]
    dtype: torch.dtype = torch.float64

    def model(self) -> Callable[[], None]:
        name = f"<program {abs(hash(self.source))}>"
        linecache.cache[name] = (
            len(self.source),
            None,
            self.source.splitlines(True),
            name,
        )  # so that reasons quote lines
        namespace = {
            "torch": torch,
            "pyro": pyro,
            "dist": dist,
            "poutine": poutine,
            "F": torch.nn.functional,
            "data": seeded,
        }
        exec(compile(self.source, name, "exec"), namespace)
        return namespace["model"]


def seeded(seed: int, shape: Sequence[int], kind: str = "real") -> Tensor:
    """Seeded data in the default dtype."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
    if kind == "index":
        return (x > 0).long()
    if kind == "simplex":
        return torch.softmax(x, -1).to(torch.get_default_dtype())
    if kind == "matrix":
        return (x @ x.mT + torch.eye(shape[-1])).to(torch.get_default_dtype())
    maps: dict[str, Callable[[Tensor], Tensor]] = {
        "real": lambda x: x,
        "positive": lambda x: (0.5 * x).exp(),
        "unit": torch.sigmoid,
        "bit": lambda x: (x > 0).double(),
        "count": lambda x: (3 * x).abs().floor(),
    }
    return maps[kind](x).to(torch.get_default_dtype())


Sites = dict[str, bool]  # site -> whether the expression has, in it, the form its argument asks for


@dataclass(frozen=True)
class Expression:
    text: str
    sites: Sites = field(default_factory=dict)


@dataclass(frozen=True)
class Latent:
    """A latent site: its sort, the plates it is in, whether it has a leading dim of K components to
    gather from, and the variable that holds its values, where some of these are data."""

    name: str
    sort: str
    level: str = ""
    components: bool = False
    variable: str = ""

    @property
    def value(self) -> str:
        return self.variable or self.name


class _Writer:
    def __init__(self, choose: Callable[[int], int]):
        self.choose = choose
        self.latents: list[Latent] = []
        self.lines: list[str] = []
        self.header: list[str] = []
        self.pairs: dict[tuple[str, str], bool] = {}
        self.features: set[str] = set()
        self.count = 0

    # -- choices ---------------------------------------------------------------------------------

    def pick(self, options: Sequence[Any]) -> Any:
        return options[self.choose(len(options))]

    def chance(self, one_in: int) -> bool:
        return self.choose(one_in) == one_in - 1

    def fresh(self, prefix: str) -> str:
        self.count += 1
        return f"{prefix}{self.count}"

    def data(self, shape: tuple[int, ...], kind: str = "real") -> str:
        name = self.fresh("x")
        self.header.append(f"{name} = data({self.count}, {shape}, {kind!r})")
        return name

    # -- sites as operands -----------------------------------------------------------------------

    def reach(self, sort: str, level: str) -> Expression | None:
        """One element (or event) of a latent of a sort for each element of a level, or None where
        there is none."""
        found = [e for latent in self.latents if latent.sort == sort and (e := self.element(latent, level)) is not None]
        return self.pick(found) if found else None

    def element(self, latent: Latent, level: str) -> Expression | None:
        name = latent.name
        if not set(latent.level) <= set(level):
            return None
        if not latent.components:
            return Expression(latent.value, {name: not latent.variable or latent.sort in MIXABLE})
        states = [
            z for z in self.latents if z.sort in ("state", "bit") and not z.components and set(z.level) <= set(level)
        ]
        if states and not self.chance(3):
            z = self.pick(states)
            self.features.add("mixture")
            index = z.value if z.sort == "state" else f"{z.value}.long()"
            return Expression(f"{name}[{index}]", {name: True, z.name: True})
        self.features.add("gather")
        index = str(self.choose(K)) if level == "" else self.data(SHAPES[level], "index")
        return Expression(f"{name}[{index}]", {name: True})

    def among(self, sort: str, components: bool) -> list[Latent]:
        return [x for x in self.latents if x.sort == sort and x.components is components and x.level == ""]

    # -- arguments -------------------------------------------------------------------------------

    def constant(self, level: str, kind: str = "real") -> str:
        if self.chance(2):
            return self.data(SHAPES[level], kind)
        return {"real": "0.3", "positive": "1.7", "unit": "0.4"}[kind]

    def loc(self, level: str) -> Expression:
        """A sum of terms; affine in each site where all terms are."""
        terms = [self.term(level) for _ in range(1 + self.choose(2))]
        if self.chance(4):
            terms.append(Expression(self.constant(level)))
        return Expression(" + ".join(t.text for t in terms), _all_of(terms))

    def term(self, level: str) -> Expression:
        options = [
            self.scaled,
            self.scaled,
            self.product,
            self.dot,
            self.difference,
            self.summed,
            self.logged,
            self.trap_loc,
        ]
        term = self.pick(options)(level)
        return term if term is not None else Expression(self.constant(level))

    def scaled(self, level: str) -> Expression | None:
        r = self.reach("real", level)
        if r is None:
            return None
        forms = [
            "{r}",
            "2.0 * {r}",
            "({r} - {c})",
            "{r} / {p}",
            "-{r}",
            "{c} * {r}",
            "torch.add({r}, 1.0)",
            "torch.mul({c}, {r})",
        ]
        return Expression(self.fill(self.pick(forms), level, r=r.text), r.sites)

    def fill(self, form: str, level: str, **parts: str) -> str:
        if "{c}" in form:
            parts["c"] = self.data(SHAPES[level])
        if "{p}" in form:
            parts["p"] = self.data(SHAPES[level], "positive")
        return form.format(**parts)

    def product(self, level: str) -> Expression | None:
        a = self.reach("real", level)
        b = self.reach(self.pick(["real", "bit"]), level)
        if a is None or b is None:
            return None
        self.features.add("product")
        twice = {
            name: False
            for name in set(a.sites) & set(b.sites)
            if name in {x.name for x in self.latents if x.sort == "real"}
        }
        return Expression(f"{a.text} * ({b.text})", {**a.sites, **b.sites, **twice})

    def dot(self, level: str) -> Expression | None:
        vectors = self.among("real", True) + self.among("vector", False)
        if not vectors:
            return None
        w = self.pick(vectors)
        self.features.add("sum")
        x = self.data((*SHAPES[level], K))
        forms = [
            "({x} * {w}).sum(-1)",
            "{x} @ {w}",
            "torch.einsum('...d,d->...', {x}, {w})",
            "F.linear({x}, {w})",
            "torch.matmul({x}, {w})",
        ]
        form = self.pick(forms[:-2] + forms[-1:] if level == "" else forms)
        return Expression(form.format(x=x, w=w.value), {w.name: True})

    def difference(self, level: str) -> Expression | None:
        vectors = self.among("real", True)
        if not vectors:
            return None
        self.features.add("sum")
        w = self.pick(vectors).name
        i, j = ("0", "1") if level == "" else (self.data(SHAPES[level], "index"), self.data(SHAPES[level], "index"))
        return Expression(
            self.pick([f"({w}[{i}] - {w}[{j}])", f"{w}.sum()", f"{w}.mean() * 0.5", f"{w}.cumsum(-1)[{i}]"]),
            {w: True},
        )

    def summed(self, level: str) -> Expression | None:
        """A site of a plate, used outside it."""
        inside = [x for x in self.latents if x.sort == "real" and x.level == "n" and not x.components]
        if not inside or level != "":
            return None
        self.features.add("sum")
        w = self.pick(inside)
        x = self.data((3,))
        forms = ["({x} * {w}).sum()", "{w}.mean()", "{x} @ {w}"]
        return Expression(self.pick(forms).format(x=x, w=w.value), {w.name: True})

    def logged(self, level: str) -> Expression | None:
        v = self.reach("lognormal", level)
        return (
            None
            if v is None
            else Expression(
                self.pick(["{v}.log()", "2 * torch.log({v})", "({v} ** 2).log()"]).format(v=v.text), v.sites
            )
        )

    def trap_loc(self, level: str) -> Expression | None:
        if not self.chance(3):
            return self.scaled(level)
        r = self.reach(self.pick(["real", "real", "tau", "unit"]), level)
        if r is None:
            return None
        self.features.add("trap")
        forms = [
            "({r}).exp()",
            "({r}) * ({r})",
            "({r}) ** 2",
            "torch.sin({r})",
            "({r}).abs()",
            "torch.relu({r})",
            "torch.tanh({r})",
        ]
        return Expression(self.pick(forms).format(r=r.text), self.broken(r.sites))

    def broken(self, sites: Sites) -> Sites:
        """The continuous sites of an expression lose their form; an index keeps its own."""
        sorts = {x.name: x.sort for x in self.latents}
        return {name: sorts[name] in ("state", "bit") and ok for name, ok in sites.items()}

    def positive(self, level: str) -> Expression:
        """Proportional to Gamma sites and to reciprocals of InverseGamma sites, or one of the traps."""
        if self.chance(4):
            return self.trap_positive(level)
        parts = [self.factor(level) for _ in range(1 + self.choose(2) * self.choose(2))]
        found = [p for p in parts if p is not None]
        if len(found) == 2 and set(found[0].sites) & set(found[1].sites):
            found = found[:1]
        if not found:
            return Expression(self.constant(level, "positive"))
        if self.chance(3):
            found.append(Expression(self.constant(level, "positive")))
        return Expression(" * ".join(p.text for p in found), _all_of(found))

    def factor(self, level: str) -> Expression | None:
        if self.chance(3):
            v = self.reach("variance", level)
            return (
                None
                if v is None
                else Expression(self.pick(["(1 / {v})", "{v}.reciprocal()", "{v} ** -1"]).format(v=v.text), v.sites)
            )
        return self.reach("tau", level)

    def trap_positive(self, level: str) -> Expression:
        t = self.reach(self.pick(["tau", "tau", "variance", "half", "real", "lognormal"]), level)
        if t is None:
            return Expression(self.constant(level, "positive"))
        self.features.add("trap")
        forms = ["(1 + {t})", "({t} * {t})", "{t}.sqrt()", "({t} + {t} ** 2)", "({t} + 1e-6)"]
        real = next((x for x in self.latents if x.name in t.sites and x.sort == "real"), None)
        form = self.pick(["({t}).exp()", "F.softplus({t})"] if real is not None else forms)
        return Expression(form.format(t=t.text), self.broken(t.sites))

    def scale(self, level: str) -> Expression:
        if self.chance(3):
            return Expression(self.constant(level, "positive"))
        p = self.positive(level)
        if not p.sites:
            return p
        if self.chance(10):
            self.features.add("trap")
            return Expression(f"(({p.text}).rsqrt() + 1e-6)", self.broken(p.sites))
        forms = [
            "({p}).rsqrt()",
            "1 / ({p}).sqrt()",
            "({p}) ** -0.5",
            "(1 / ({p})).sqrt()",
            "torch.pow({p}, -0.5)",
            "torch.exp(-0.5 * ({p}).log())",
        ]
        return Expression(self.pick(forms).format(p=p.text), p.sites)

    def probability(self, level: str) -> tuple[str, Expression]:
        """`probs` or `logits`, and its expression."""
        p = self.reach("unit", level)
        if p is None or self.chance(8):
            r = self.reach("real", level)
            if r is None:
                return "probs", Expression(self.constant(level, "unit"))
            self.features.add("trap")
            return "logits", Expression(r.text, self.broken(r.sites))
        if self.chance(4):
            self.features.add("trap")
            forms = ["0.9 * {p}", "{p} * {p}", "0.2 + 0.5 * {p}", "{p}.sqrt()"]
            return "probs", Expression(self.pick(forms).format(p=p.text), self.broken(p.sites))
        if self.chance(3):
            self.features.add("logits")
            return "logits", Expression(
                self.pick(["torch.logit({p})", "({p}).log() - torch.log1p(-{p})"]).format(p=p.text), p.sites
            )
        form = self.pick(["{p}", "{p}", "1 - {p}", "1.0 - (1 - {p})"])
        return "probs", Expression(form.format(p=p.text), p.sites)

    def simplex(self, level: str) -> tuple[str, Expression]:
        t = self.reach("simplex", level)
        if t is None:
            return "probs", Expression(self.data((K,), "simplex"))
        if self.chance(5):
            self.features.add("trap")
            forms = ["{t} * {t}", "0.5 * {t} + 0.25", "torch.softmax({t}, -1)", "{t}.sqrt()"]
            return "probs", Expression(self.pick(forms).format(t=t.text), self.broken(t.sites))
        if self.chance(4):
            self.features.add("logits")
            return "logits", Expression(f"{t.text}.log()", t.sites)
        return "probs", Expression(
            self.pick(["{t}", "{t}", "{t}.flip(-1)", "torch.stack([{t}[..., 1], {t}[..., 0]], -1)"]).format(t=t.text),
            t.sites,
        )

    def vector(self, level: str) -> Expression:
        u = self.reach("vector", level)
        if u is None:
            a, b = self.reach("real", level), self.reach("real", level)
            if a is None or b is None or self.chance(2):
                return Expression(self.data((*SHAPES[level], 2)))
            return Expression(
                f"torch.stack(torch.broadcast_tensors({a.text} + {self.zeros(level)}, "
                f"{b.text} + {self.zeros(level)}), -1)",
                self.without_states(_all_of([a, b])),
            )
        if self.chance(6):
            self.features.add("trap")
            return Expression(
                self.pick(["{u}.exp()", "{u} * {u}", "torch.tanh({u})"]).format(u=u.text),
                self.broken(u.sites),
            )
        a, c = self.data((2, 2)), self.data((2,))
        forms = [
            "{u}",
            "{u} + {c}",
            "{u} @ {a}",
            "({a} @ {u}.unsqueeze(-1)).squeeze(-1)",
            "{c} * {u}",
            "{u}.flip(-1)",
        ]
        return Expression(self.pick(forms).format(u=u.text, a=a, c=c), u.sites)

    def without_states(self, sites: Sites) -> Sites:
        """A state is enumerated by broadcasting; `torch.stack` does not: conjugate, but not found."""
        states = {x.name for x in self.latents if x.sort in ("state", "bit")}
        return {name: ok and not states & set(sites) for name, ok in sites.items()}

    def zeros(self, level: str) -> str:
        return f"torch.zeros({SHAPES[level]})"

    def precision(self, level: str) -> Expression:
        """A matrix in each of its parametrisations: `name=expression`."""
        w = self.reach("matrix", level)
        if w is None or self.chance(3):
            t = self.reach("tau", level)
            base = self.data((2, 2), "matrix")
            w = (
                Expression(base)
                if t is None
                else Expression(f"({t.text} + {self.zeros(level)})[..., None, None] * {base}", t.sites)
            )
        text, sites = w.text, w.sites
        if sites and self.chance(6):
            self.features.add("trap")
            text, sites = f"({text} + torch.eye(2))", self.broken(sites)
        elif sites and self.chance(4):
            a = self.data((2, 2))
            text = f"({a} @ ({text}) @ {a}.T)"
        forms = [
            "precision_matrix={w}",
            "precision_matrix={w}",
            "covariance_matrix=torch.linalg.inv({w})",
            "covariance_matrix=torch.inverse({w})",
            "scale_tril=torch.linalg.cholesky(torch.linalg.inv({w}))",
            "covariance_matrix=torch.cholesky_inverse(torch.linalg.cholesky({w}))",
        ]
        return Expression(self.pick(forms).format(w=text), sites)

    # -- statements ------------------------------------------------------------------------------

    def statement(
        self,
        name: str,
        level: str,
        text: str,
        parts: Sequence[Expression],
        own: bool | None,
        obs: str | None,
        components: bool,
    ) -> None:
        """`own`: whether the site's own factor is conjugate to it; None for data, True or False beside `obs` for
        a site that is seen in part."""
        plates = [*("gn"[i] for i in range(2) if "gn"[i] in level), *(["k"] if components else [])]
        handler, hidden = self.handler(level, own is None)
        mask = ""
        if self.chance(8) and not components:
            self.features.add("mask")
            mask = f".mask({self.data(SHAPES[level], 'bit')}.bool())"
        sites = self.joined(parts) | hidden
        arguments = "" if obs is None else f", obs={obs}"
        if obs is not None and own is not None:
            arguments += f", obs_mask={self.data(SHAPES[level], 'bit')}.bool()"
            self.add_pairs(f"{name}_observed", sites)
            self.add_pairs(f"{name}_unobserved", {**sites, f"{name}_unobserved": own})
        else:
            self.add_pairs(name, sites if own is None else {**sites, name: own})
        contexts = plates + handler
        opening = f"    with {', '.join(contexts)}:\n        " if contexts else "    "
        self.lines.append(f'{opening}{name} = pyro.sample("{name}", {text}{mask}{arguments})')

    def joined(self, parts: Sequence[Expression]) -> Sites:
        """The sites of a factor's arguments; one in two arguments is conjugate in neither."""
        sites = _all_of(parts)
        seen: set[str] = set()
        continuous = {x.name for x in self.latents if x.sort not in ("state", "bit")}
        for part in parts:
            sites.update({site: False for site in set(part.sites) & seen & continuous})
            seen |= set(part.sites)
        return sites

    def add_pairs(self, factor: str, sites: Sites) -> None:
        exact = all(sites.values())
        self.pairs.update({(factor, site): exact for site in sites})

    def handler(self, level: str, is_data: bool) -> tuple[list[str], Sites]:
        """A handler around a statement, and the sites that it depends on."""
        if self.chance(10):
            self.features.add("scale")
            return ["poutine.scale(scale=2.5)"], {}
        if not self.chance(12):
            return [], {}
        self.features.add("mask")
        bit = self.reach("bit", level) if is_data and self.chance(2) else None
        if bit is not None:
            self.features.add("latent mask")
            return [f"poutine.mask(mask={bit.text}.bool())"], bit.sites
        real = self.reach("real", level) if is_data and self.chance(3) else None
        if real is not None:
            self.features.add("latent mask")
            return [f"poutine.mask(mask={real.text} > 0.1)"], self.broken(real.sites)
        return [f"poutine.mask(mask={self.data(SHAPES[level], 'bit')}.bool())"], {}

    def latent(self) -> None:
        components = self.chance(2)
        level = "" if components else self.pick(["", "", "n", "g", "gn"])
        sort = self.pick(SORTS)
        if sort in ("state", "bit"):
            components, level = False, self.pick(["n", "n", ""])
        name = self.fresh(
            {
                "real": "r",
                "tau": "t",
                "variance": "v",
                "unit": "p",
                "simplex": "s",
                "vector": "u",
                "matrix": "w",
            }.get(sort, sort[0])
        )
        text, parts, own = getattr(self, f"new_{sort}")(level)
        if components and sort in ("real", "tau", "variance", "unit", "lognormal") and self.chance(2) and not parts:
            self.features.add("event")
            self.statement(name, level, f"{text}.expand([{K}]).to_event(1)", parts, own, None, False)
        elif not components and self.chance(10):
            self.features.add("obs_mask")
            self.statement(name, level, text, parts, own, self.seen(sort, level), False)
            self.latents.append(Latent(f"{name}_unobserved", sort, level, False, name))
            return
        else:
            self.statement(name, level, text, parts, own, None, components)
        self.latents.append(Latent(name, sort, level, components))

    def seen(self, sort: str, level: str) -> str:
        """Data in the support of a sort of latent."""
        kind, event = {
            "real": ("real", ()),
            "unit": ("unit", ()),
            "simplex": ("simplex", (K,)),
            "vector": ("real", (2,)),
            "matrix": ("matrix", (2, 2)),
            "state": ("index", ()),
            "bit": ("bit", ()),
        }.get(sort, ("positive", ()))
        return self.data((*SHAPES[level], *event), kind)

    def new_real(self, level: str) -> tuple[str, list[Expression], bool]:
        if self.chance(3):
            return "dist.Normal(0.2, 1.5)", [], True
        loc, scale = self.loc(level), self.scale(level)
        return f"dist.Normal({loc.text}, {scale.text})", [loc, scale], True

    def new_tau(self, level: str) -> tuple[str, list[Expression], bool]:
        if self.chance(4):
            return self.pick(["dist.Exponential(1.3)", "dist.Chi2(torch.tensor(3.0))"]), [], True
        if self.chance(3):
            rate = self.positive(level)
            return (
                self.pick(["dist.Gamma(2.5, {r})", "dist.Exponential({r})"]).format(r=rate.text),
                [rate],
                True,
            )
        if self.chance(8):
            t = self.reach("tau", level)
            if t is not None:
                self.features.add("trap")
                return f"dist.Gamma({t.text}, 1.0)", [Expression("", self.broken(t.sites))], True
        return "dist.Gamma(2.0, 1.5)", [], True

    def new_variance(self, level: str) -> tuple[str, list[Expression], bool]:
        rate = self.positive(level) if self.chance(3) else Expression("1.2")
        return f"dist.InverseGamma(2.5, {rate.text})", [rate], True

    def new_unit(self, level: str) -> tuple[str, list[Expression], bool]:
        return self.pick(["dist.Beta(1.5, 2.5)", "dist.Uniform(0.0, 1.0)"]), [], True

    def new_simplex(self, level: str) -> tuple[str, list[Expression], bool]:
        return f"dist.Dirichlet({self.data((K,), 'positive')})", [], True

    def new_vector(self, level: str) -> tuple[str, list[Expression], bool]:
        loc, precision = self.vector(level), self.precision(level)
        return f"dist.MultivariateNormal({loc.text}, {precision.text})", [loc, precision], True

    def new_matrix(self, level: str) -> tuple[str, list[Expression], bool]:
        argument = self.pick(["precision_matrix", "covariance_matrix"])
        return f"dist.Wishart(torch.tensor(4.0), {argument}={self.data((2, 2), 'matrix')})", [], True

    def new_state(self, level: str) -> tuple[str, list[Expression], bool]:
        argument, probs = self.simplex(level)
        return f"dist.Categorical({argument}={probs.text})", [probs], True

    def new_bit(self, level: str) -> tuple[str, list[Expression], bool]:
        argument, probs = self.probability(level)
        return f"dist.Bernoulli({argument}={probs.text})", [probs], True

    def new_lognormal(self, level: str) -> tuple[str, list[Expression], bool]:
        loc, scale = self.loc(level), self.scale(level)
        return f"dist.LogNormal({loc.text}, {scale.text})", [loc, scale], True

    def new_half(self, level: str) -> tuple[str, list[Expression], bool]:
        self.features.add("trap")
        return self.pick(["dist.HalfNormal(1.0)", "dist.HalfCauchy(1.0)"]), [], False

    def observed(self) -> None:
        level = self.pick(["n", "n", "gn", "", "g"])
        kind = self.pick(["normal", "normal", "normal", "vector", "counts", "bits", "states", "positive"])
        name = self.fresh("y")
        text, parts, obs = getattr(self, f"observe_{kind}")(level)
        self.statement(name, level, text, parts, None, obs, False)

    def observe_normal(self, level: str) -> tuple[str, list[Expression], str]:
        loc, scale = self.loc(level), self.scale(level)
        family, kind = self.pick([("Normal", "real"), ("Normal", "real"), ("LogNormal", "positive")])
        if self.chance(4):
            self.features.add("event")
            wide = [f"({p.text} + {self.zeros(level)}).unsqueeze(-1)" for p in (loc, scale)]
            return (
                f"dist.{family}({wide[0]}, {wide[1]}).expand({(*SHAPES[level], 2)}).to_event(1)",
                [loc, scale],
                self.data((*SHAPES[level], 2), kind),
            )
        if kind == "real" and self.chance(8):
            self.features.add("trap")
            parts = [Expression("", self.broken(_all_of([loc, scale])))]
            return f"dist.StudentT(5.0, {loc.text}, {scale.text})", parts, self.data(SHAPES[level])
        return f"dist.{family}({loc.text}, {scale.text})", [loc, scale], self.data(SHAPES[level], kind)

    def observe_vector(self, level: str) -> tuple[str, list[Expression], str]:
        loc, precision = self.vector(level), self.precision(level)
        return (
            f"dist.MultivariateNormal({loc.text}, {precision.text})",
            [loc, precision],
            self.data((*SHAPES[level], 2)),
        )

    def observe_counts(self, level: str) -> tuple[str, list[Expression], str]:
        rate = self.positive(level)
        return f"dist.Poisson({rate.text})", [rate], self.data(SHAPES[level], "count")

    def observe_positive(self, level: str) -> tuple[str, list[Expression], str]:
        rate = self.positive(level)
        form = self.pick(["dist.Exponential({r})", "dist.Gamma(2.0, {r})", "dist.InverseGamma(2.0, {r})"])
        return form.format(r=rate.text), [rate], self.data(SHAPES[level], "positive")

    def observe_bits(self, level: str) -> tuple[str, list[Expression], str]:
        argument, p = self.probability(level)
        form, kind = self.pick(
            [
                ("dist.Bernoulli({p})", "bit"),
                ("dist.Binomial(torch.tensor(9.0), {p})", "count"),
                ("dist.Geometric({p})", "count"),
                ("dist.NegativeBinomial(torch.tensor(3.0), {p})", "count"),
            ]
        )
        return form.format(p=f"{argument}={p.text}"), [p], self.data(SHAPES[level], kind)

    def observe_states(self, level: str) -> tuple[str, list[Expression], str]:
        argument, p = self.simplex(level)
        if self.chance(4):
            return (
                f"dist.OneHotCategorical({argument}={p.text})",
                [p],
                f"F.one_hot({self.data(SHAPES[level], 'index')}, {K}).to(torch.get_default_dtype())",
            )
        return f"dist.Categorical({argument}={p.text})", [p], self.data(SHAPES[level], "index")

    # -- the program -----------------------------------------------------------------------------

    def program(self) -> Written:
        subsample = self.pick(["", "", ", subsample_size=3", ", subsample=torch.tensor([4, 0, 2])"])
        if subsample:
            self.features.add("subsample")
        for _ in range(3 + self.choose(4)):
            self.latent()
        for _ in range(2 + self.choose(2)):
            self.observed()
        plates = [
            '    g = pyro.plate("g", 2, dim=-2)',
            f'    n = pyro.plate("n", {6 if subsample else 3}{subsample}, dim=-1)',
            f'    k = pyro.plate("k", {K}, dim=-1)',
        ]
        plates = [line for line in plates if any(f"with {line[4]}" in x or f", {line[4]}" in x for x in self.lines)]
        source = "\n".join([*self.header, "", "", "def model():", *plates, *self.lines, ""])
        single = self.chance(15)
        return Written(source, self.pairs, frozenset(self.features), torch.float32 if single else torch.float64)


def _all_of(parts: Sequence[Expression]) -> Sites:
    """Each site, and whether it has its form wherever it stands."""
    sites: Sites = {}
    for part in parts:
        for name, ok in part.sites.items():
            sites[name] = sites.get(name, True) and ok
    return sites


def written(seed: int) -> Written:
    """The program of a seed."""
    generator = random.Random(seed)
    return _Writer(lambda n: generator.randrange(n)).program()


@st.composite
def programs(draw: Callable) -> Written:
    """Random programs; choices shrink to each list's first entry."""
    return _Writer(lambda n: draw(st.integers(0, n - 1))).program()
