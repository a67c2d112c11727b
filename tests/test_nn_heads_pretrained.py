"""`bayesian_head` on tiny models with random weights, made from their configurations, and adapters trained by `BLROptimizer`."""

from __future__ import annotations

import copy
import os
import re
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical

from pyro_blr.nn import BLROptimizer, CategoricalHead, GaussianHead, bayesian_head

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'pyro_blr[llm]'")
# What peft and transformers tell each other.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

SIZES: dict[str, Any] = dict(vocab_size=40, bos_token_id=1, eos_token_id=2, pad_token_id=0)


@pytest.fixture(autouse=True)
def float32() -> None:
    torch.set_default_dtype(torch.float32)
    transformers.set_seed(0)


def gpt2(kind: str = "CausalLM", **options: Any) -> Any:
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=32, **SIZES, **options)
    return getattr(transformers, f"AutoModelFor{kind}").from_config(config).eval()


def llama(kind: str = "CausalLM", **options: Any) -> Any:
    sizes = dict(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2
    )
    config = transformers.LlamaConfig(**sizes, **SIZES, **options)
    return getattr(transformers, f"AutoModelFor{kind}").from_config(config).eval()


def encoder(family: str, **options: Any) -> Any:
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, **SIZES)
    config = getattr(transformers, f"{family}Config")(**sizes, **options)
    return transformers.AutoModelForSequenceClassification.from_config(config).eval()


def batch(padded: bool = True) -> dict[str, Tensor]:
    tokens, mask = torch.randint(3, 40, (6, 8)), torch.ones(6, 8, dtype=torch.long)
    if padded:
        tokens[:2, 5:], mask[:2, 5:] = 0, 0
    return {"input_ids": tokens, "attention_mask": mask}


@pytest.mark.parametrize("make", [gpt2, llama], ids=["tied", "untied"])
def test_a_language_model_goes_on_as_before(make: Any) -> None:
    """Logits, generated tokens and, where they were tied, the embeddings."""
    model = make()
    before, inputs = copy.deepcopy(model), batch()
    posterior = bayesian_head(model)
    assert isinstance(posterior.head, CategoricalHead) and posterior.head.covariance == "full"
    torch.testing.assert_close(model(**inputs).logits, before(**inputs).logits, rtol=1e-5, atol=1e-6)
    options = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(**inputs, **options), before.generate(**inputs, **options))
    embeddings = model.get_input_embeddings().weight
    posterior.refresh(42, **inputs)
    assert not torch.equal(model(**inputs).logits, before(**inputs).logits)
    assert torch.equal(embeddings, before.get_input_embeddings().weight)
    assert model.config.tie_word_embeddings is False
    assert model.generate(**inputs, **options).shape == (6, 13)
    assert not any("head" in name for name, _ in model.named_parameters())


def test_next_tokens_are_targets_and_padding_is_none() -> None:
    """Against hidden states and labels taken from the model one by one."""
    model, inputs = gpt2(), batch()
    hidden = model.transformer(**inputs).last_hidden_state.detach()
    features, targets = bayesian_head(model).rows(**inputs)
    pairs = [(i, t) for i in range(6) for t in range(7) if inputs["attention_mask"][i, t + 1]]
    torch.testing.assert_close(features, torch.stack([hidden[i, t] for i, t in pairs]))
    assert targets.tolist() == [inputs["input_ids"][i, t + 1].item() for i, t in pairs]
    labels = inputs["input_ids"].clone()
    labels[:, :7] = -100
    assert bayesian_head(gpt2()).rows(**inputs, labels=labels)[1].tolist() == labels[:, 7].tolist()


@pytest.mark.parametrize(
    "make",
    [
        lambda: gpt2("SequenceClassification", num_labels=3),
        lambda: llama("SequenceClassification", num_labels=3),
        lambda: encoder("Bert", num_labels=3),
        lambda: encoder("Roberta", num_labels=3),
    ],
    ids=["gpt2", "llama", "bert", "roberta"],
)
def test_classifiers_learn_from_their_pooled_features(make: Any) -> None:
    """Decoders pool at the last token that is no padding: the head's rows are what the model's own pooling gives."""
    model, inputs = make(), batch()
    posterior = bayesian_head(model, prior_precision=0.1, from_weights=False)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    features, targets = posterior.rows(**inputs, labels=labels)
    assert features.shape == (6, 16) and torch.equal(targets, labels)
    torch.testing.assert_close(posterior.head(features), model(**inputs).logits)
    posterior.observe(**inputs, labels=labels)
    prediction = posterior.predict(**inputs, num_samples=256)
    assert prediction.probabilities.shape == (6, 3) and prediction.mutual_information.shape == (6,)
    assert prediction.probabilities[torch.arange(6), labels].mean() > 1 / 3
    own = CategoricalHead(16, 3, model.config.model_type in ("bert", "roberta"), prior_precision=0.1)
    own.observe(features, labels)
    torch.testing.assert_close(own.mean, posterior.head.mean)


def test_every_token_has_its_uncertainty() -> None:
    model, inputs = llama(), batch(padded=False)
    posterior = bayesian_head(model, covariance="eigenbasis", from_weights=False, prior_precision=1.0)
    for _ in range(50):
        posterior.refresh(42, **inputs)
    prediction = posterior.predict(**inputs, num_samples=0)
    assert prediction.entropy.shape == (6, 8) and prediction.logit_variance.shape == (6, 8, 40)
    fresh = bayesian_head(llama(), covariance="eigenbasis", from_weights=False, prior_precision=1.0)
    assert (prediction.logit_variance < fresh.predict(**inputs, num_samples=0).logit_variance).all()


def test_labels_of_other_kinds_have_their_heads() -> None:
    inputs = batch()
    several = bayesian_head(encoder("Bert", num_labels=3, problem_type="multi_label_classification"))
    local = several.observe(**inputs, labels=torch.randint(2, (6, 3)).float())
    assert local.shape == (6, 3) and several.predict(**inputs).probabilities.shape == (6, 3)
    number = bayesian_head(encoder("Bert", num_labels=1))
    number.observe(**inputs, labels=torch.randn(6, 1))
    assert isinstance(number.head, GaussianHead) and number.predict(**inputs).mean.shape == (6, 1)
    with pytest.raises(ValueError, match="expected a CategoricalHead"):
        number.refresh(6, **inputs, labels=torch.randn(6, 1))
    with pytest.raises(ValueError, match="head.forget"):
        several.forget(**inputs, labels=torch.zeros(6, 3))


def test_what_a_head_cannot_replace_is_refused() -> None:
    with pytest.raises(ValueError, match="no output embeddings"):
        bayesian_head(torch.nn.Linear(3, 3))
    with pytest.raises(ValueError, match="transformer is a GPT2Model"):
        bayesian_head(gpt2(), name="transformer")
    with pytest.raises(ValueError, match="has no layer 'heads'"):
        bayesian_head(gpt2(), name="heads")
    with pytest.raises(ValueError, match="expected one like Linear"):
        bayesian_head(gpt2(), head=CategoricalHead(16, 39, False))
    with pytest.raises(ValueError, match="expected labels as well"):
        bayesian_head(encoder("Bert", num_labels=3)).rows(**batch())
    capped = gpt2()
    forward = capped.forward

    def cap(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = 0.1 * torch.tanh(10 * output.logits)
        return output

    capped.forward = cap
    with pytest.raises(ValueError, match="scales or caps"):
        bayesian_head(capped).predict(**batch())


# -- adapters --------------------------------------------------------------------------------------------------


def adapted() -> Any:
    peft = pytest.importorskip("peft", reason="needs peft: pip install 'pyro_blr[llm]'")
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True)
    return peft.get_peft_model(gpt2(), config)


def test_adapters_alone_are_trained_and_have_a_posterior() -> None:
    model, inputs = adapted(), batch(padded=False)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    targets = inputs["input_ids"][:, 1:]
    optimizer = BLROptimizer(model.parameters(), num_data=targets.numel())

    def closure() -> tuple[Categorical, Tensor]:
        return Categorical(logits=model(**inputs).logits[:, :-1]), targets

    losses = [float(optimizer.step(closure)) for _ in range(60)]
    assert sum(losses[-10:]) < sum(losses[:10])
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name in before if "lora_" in name}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert (optimizer.stddev(parameter) > 0).all()
    with torch.no_grad():
        at_mean = model(**inputs).logits
        with optimizer.sampled():
            assert not torch.equal(model(**inputs).logits, at_mean)
            assert model.generate(**inputs, max_new_tokens=3, pad_token_id=0).shape == (6, 11)
        assert torch.equal(model(**inputs).logits, at_mean)


def test_head_and_adapters_together() -> None:
    """The head inside a peft model; adapters by the optimizer through its mean, the head by refreshing."""
    model, inputs = adapted(), batch(padded=False)
    posterior = bayesian_head(model)
    optimizer = BLROptimizer((p for p in model.parameters() if p.requires_grad), num_data=42)
    targets, losses = inputs["input_ids"][:, 1:], []
    for _ in range(30):
        losses.append(float(optimizer.step(lambda: (Categorical(logits=model(**inputs).logits[:, :-1]), targets))))
        posterior.refresh(42, **inputs)
    assert losses[-1] < losses[0]
    assert posterior.predict(**inputs, num_samples=4).mutual_information.shape == (6, 8)


def test_what_the_page_shows_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "heads.md").read_text()
    pytest.importorskip("peft", reason="needs peft: pip install 'pyro_blr[llm]'")
    exec("\n".join(re.findall(r"^```py\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)), {})
    assert capsys.readouterr().out.splitlines() == ["torch.Size([8, 16])", "torch.Size([8, 20])", "torch.Size([8, 20])"]
