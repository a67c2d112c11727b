"""A posterior on the last layer of a model from `transformers`, which goes on working as it did."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_blr.nn.heads._base import Head
from pyro_blr.nn.heads._polya_gamma import PolyaGammaHead
from pyro_blr.nn.heads.bernoulli import BernoulliHead
from pyro_blr.nn.heads.categorical import CategoricalHead
from pyro_blr.nn.heads.gaussian import GaussianHead

__all__ = ["PretrainedHead", "bayesian_head"]

# Weights up to which the covariance of a softmax head is full.
FULL_WEIGHTS = 2_000


class PretrainedHead:
    """A model and the head that took the place of its last layer, (..., C) = W φ + b: what `bayesian_head` returns.

    model: as before; its forward pass and `generate()` use the posterior mean.
    head: the `CategoricalHead`, `BernoulliHead` or `GaussianHead`.
    """

    def __init__(self, model: Any, head: Head, shift: bool) -> None:
        self.model, self.head, self.shift = model, head, shift
        self._verified = False

    @torch.no_grad()
    def features(self, **inputs: Tensor) -> Tensor:
        """What the head is applied to, (..., in_features), for inputs of the model (labels apart), pooled as the model pools its logits.

        Raises ValueError where the model's logits are not the head's, scaled or capped afterwards.
        """
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        with self._without_head():
            features = self.model(**inputs).logits
        if not self._verified:
            expected, found = self.model(**inputs).logits, self.head(features)
            scale = expected.abs().max().clamp_min(1e-6)
            if expected.shape != found.shape or (expected - found).abs().max() > 0.05 * scale:
                raise ValueError(
                    "the model's logits are not its head's output: something scales or caps them afterwards; no head can take the place of "
                    "this layer, as its posterior would not be the model's"
                )
            self._verified = True
        return features

    def rows(self, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Features (n, in_features) and targets (n, ...) of a batch with `labels`, shifted by a token where the model predicts the next.

        Labels of −100 are left out. A model that predicts the next token and was given none takes `input_ids`, padding left out.
        """
        labels = inputs.get("labels")
        if labels is None:
            if not self.shift:
                raise ValueError(f"the batch has {', '.join(sorted(inputs))}; expected labels as well")
            labels = inputs["input_ids"]
            if "attention_mask" in inputs:
                labels = labels.masked_fill(inputs["attention_mask"] == 0, -100)
        features = self.features(**inputs)
        if self.shift:
            features, labels = features[:, :-1], labels[:, 1:]
        if not isinstance(self.head, CategoricalHead):
            return features, labels
        kept = labels != -100
        return features[kept], labels[kept]

    def observe(self, **inputs: Tensor) -> Any:
        """`head.observe` on the features and labels of a batch."""
        return self.head.observe(*self.rows(**inputs))  # type: ignore[operator]

    def forget(self, **inputs: Tensor) -> None:
        """`head.forget` on the features and labels of a batch; a `BernoulliHead` is asked itself, with its local parameters."""
        if isinstance(self.head, PolyaGammaHead):
            raise ValueError("forget what observe returned: head.forget(*rows(**inputs), local)")
        self.head.forget(*self.rows(**inputs))  # type: ignore[operator]

    def refresh(self, num_data: float, rate: float = 0.01, **inputs: Tensor) -> float:
        """`CategoricalHead.refresh` on the features and labels of a batch; `num_data` counts labels: tokens, in a language model."""
        if not isinstance(self.head, CategoricalHead):
            raise ValueError(
                f"the head is a {type(self.head).__name__}, whose observe is exact; expected a CategoricalHead"
            )
        return self.head.refresh(*self.rows(**inputs), num_data, rate)

    def predict(self, **inputs: Any) -> Any:
        """`head.predict` for inputs of the model: for every token or sequence (...) a `HeadPrediction`, or a distribution.

        num_samples, beside the inputs, is passed on to the head.
        """
        options = {"num_samples": inputs.pop("num_samples")} if "num_samples" in inputs else {}
        return self.head.predict(self.features(**inputs), **options)  # type: ignore[operator]

    @contextlib.contextmanager
    def _without_head(self) -> Iterator[None]:
        """The model gives features where it gave logits."""
        self.head.forward = lambda features: features  # type: ignore[method-assign]
        try:
            yield
        finally:
            del self.head.forward


def bayesian_head(
    model: Any,
    *,
    name: str | None = None,
    head: Head | None = None,
    from_weights: bool = True,
    **options: Any,
) -> PretrainedHead:
    """W of the model's last layer, logits = W φ + b, gets the posterior N(M, Λ⁻¹); prior N(M₀, I/δ), M₀ the weights it has.

        posterior = bayesian_head(model)                        # a classifier or a causal language model
        posterior.observe(**batch)                              # or, while the model is trained: posterior.refresh(num_tokens, **batch)
        posterior.predict(**batch).mutual_information           # per sequence, or per token

    The layer is replaced in `model` by one that keeps statistics and computes with the posterior mean, so that its forward pass and
    `generate()` go on as before. Where it was tied to the input embeddings, it gets weights of its own, and the configuration says
    so from then on; the embeddings stay as they are.

    model: with logits in its output: `...ForSequenceClassification`, `...ForTokenClassification`, `...ForCausalLM`, `...ForMaskedLM` of
        `transformers`, also inside a `peft` model. The mode (train or eval) is left to the caller.
    name: of the `torch.nn.Linear` to replace; None looks for the output embeddings, or the last layer of `score` or `classifier`.
    head: one of your own; None is, as `config.problem_type` says, a `GaussianHead` for regression, a `BernoulliHead` for several labels
        at once, and else a `CategoricalHead`: with a full covariance up to 2,000 weights, then diagonal in the eigenbasis.
    from_weights: False is prior mean zero, where the layer was not trained.
    options: of the head that is made.

    Raises ValueError where there is no such layer, or it is none that a head can take the place of.
    """
    found, layer = last_layer(model, name)
    if type(layer) is not torch.nn.Linear:
        raise ValueError(
            f"{found} is a {type(layer).__name__}; expected a torch.nn.Linear: merge adapters on it first, or name another layer"
        )
    weights = (
        layer.weight.detach() if layer.bias is None else torch.cat([layer.weight, layer.bias[:, None]], 1).detach()
    )
    if head is None:
        head = fitting_head(model, layer, weights if from_weights else None, options)
    elif options or (head.in_features, head.out_features, head.has_bias) != (
        *layer.weight.T.shape,
        layer.bias is not None,
    ):
        raise ValueError(
            f"the head is {head}, with options {options}; expected one like {layer}, and its options with it"
        )
    untie(model, layer)
    parent, _, child = found.rpartition(".")
    setattr(model.get_submodule(parent), child, head.to(layer.weight.device))
    return PretrainedHead(model, head, predicts_next(model))


def untie(model: Any, layer: torch.nn.Linear) -> None:
    """The configuration says that this layer has weights of its own, where it shared them with the input embeddings."""
    embeddings = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if embeddings is not None and embeddings.weight is layer.weight:
        model.config.tie_word_embeddings = False


def predicts_next(model: Any) -> bool:
    """Whether logits are of the token after each one: a decoder by itself."""
    generates = hasattr(model, "can_generate") and model.can_generate()
    return generates and not getattr(model.config, "is_encoder_decoder", False)


def last_layer(model: Any, name: str | None) -> tuple[str, Any]:
    """The layer that makes the logits, and its name in the model."""
    modules: Mapping[str, Any] = dict(model.named_modules())
    if name is not None:
        if name not in modules:
            raise ValueError(f"the model has no layer {name!r}; expected one of {', '.join(filter(None, modules))}")
        return name, modules[name]
    embeddings = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if embeddings is not None:
        return next(name for name, module in modules.items() if module is embeddings), embeddings
    labels = getattr(getattr(model, "config", None), "num_labels", None)
    places = [
        (name, module)
        for name, module in modules.items()
        if isinstance(module, torch.nn.Linear)
        and module.out_features == labels
        and any(part in ("score", "classifier") for part in name.split("."))
    ]
    if not places:
        raise ValueError(
            "the model has no output embeddings, and no layer in `score` or `classifier` with as many outputs as labels: give its name"
        )
    return places[-1]


def fitting_head(model: Any, layer: torch.nn.Linear, weights: Tensor | None, options: dict[str, Any]) -> Head:
    """The head for what the model's configuration says its labels are."""
    classes, width = layer.weight.shape
    bias, kind = layer.bias is not None, getattr(getattr(model, "config", None), "problem_type", None)
    prior = None if weights is None else weights.float()
    if kind == "regression" or classes == 1:
        return GaussianHead(width, classes, bias, prior_mean=prior, **options)
    if kind == "multi_label_classification":
        return BernoulliHead(width, classes, bias, prior_mean=prior, **options)
    covariance = "full" if classes * (width + bias) <= FULL_WEIGHTS else "eigenbasis"
    options = {"covariance": covariance, "dtype": torch.float32, **options}
    return CategoricalHead(width, classes, bias, prior_mean=prior, **options)
