"""The decoder against transformers' Llama, and against itself run another way."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from kanlm.model import KanLMConfig, KanLMForCausalLM, KanLMModel
from kanlm.model.feed_forward import MoE
from kanlm.model.feed_forward.convolution import CausalConvolution
from kanlm.model.layers import RMSNorm

VOCAB = 53
KAN = {"kind": "kan", "basis": {"kind": "bspline", "grid_size": 4}}
MIXED = [KAN, {"kind": "swiglu"}]
MOE = {"kind": "moe", "experts": [KAN, {"kind": "swiglu"}], "num_experts": 4}
CONVOLVED = {"kind": "conv-kan", "block": KAN}


def make(**fields: Any) -> KanLMForCausalLM:
    """A small model whose weights, norms included, are all random."""
    torch.manual_seed(0)
    defaults = {"d_model": 32, "n_layers": 2, "n_heads": 4, "context_length": 24}
    config = KanLMConfig(**{"vocab_size": VOCAB, "eos_token_id": 0, **defaults, **fields})
    model = KanLMForCausalLM(config).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, RMSNorm):
                module.weight.uniform_(0.5, 1.5)
            elif isinstance(module, CausalConvolution):
                module.weight.uniform_(-1, 1)
    return model


def tokens(batch: int = 2, length: int = 24, seed: int = 1) -> torch.Tensor:
    # 0 ends a document: generation would stop there.
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def generate(model: Any, prompt: torch.Tensor, **options: Any) -> torch.Tensor:
    """Greedy continuation. (transformers types `generate` for its own classes alone.)"""
    return model.generate(prompt, do_sample=False, **options)


MODELS = {
    "kan, tied": {"feed_forward": KAN},
    "kan of degree 3, untied": {
        "feed_forward": {"kind": "kan", "basis": {"kind": "bspline", "degree": 3}, "base": None},
        "tie_embeddings": False,
    },
    "mixed, grouped queries, qk norm": {
        "feed_forward": MIXED,
        "n_kv_heads": 2,
        "qk_norm": True,
    },
    "gelu": {"feed_forward": {"kind": "gelu", "hidden": 40}},
    "relu2, untied": {"feed_forward": {"kind": "relu2"}, "tie_embeddings": False},
    "experts": {"feed_forward": MOE},
    "convolutions, of experts too": {
        "feed_forward": [CONVOLVED, {"kind": "conv-kan", "kernel_size": 2, "block": MOE}]
    },
}


@pytest.fixture(params=MODELS.values(), ids=list(MODELS))
def model(request: pytest.FixtureRequest) -> KanLMForCausalLM:
    return make(**request.param)


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
def test_with_swiglu_it_is_a_llama(n_kv_heads: int) -> None:
    ours = make(feed_forward={"kind": "swiglu", "hidden": 48}, n_kv_heads=n_kv_heads)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=n_kv_heads,
            tie_word_embeddings=True,
        )
    ).eval()
    renamed = {
        name.replace("attention_norm", "input_layernorm")
        .replace("feed_forward_norm", "post_attention_layernorm")
        .replace("attention.", "self_attn.")
        .replace("feed_forward.gate.", "mlp.gate_proj.")
        .replace("feed_forward.up.", "mlp.up_proj.")
        .replace("feed_forward.down.", "mlp.down_proj."): value
        for name, value in ours.state_dict().items()
    }
    llama.load_state_dict(renamed)
    ids = tokens()
    theirs = llama(input_ids=ids, labels=ids)
    mine = ours(input_ids=ids, labels=ids)
    torch.testing.assert_close(mine.logits, theirs.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine.loss, theirs.loss)


def test_saved_and_loaded_logits_are_bitwise_equal(model: KanLMForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, KanLMForCausalLM)
    assert loaded.config.settings == model.config.settings
    assert isinstance(AutoConfig.from_pretrained(tmp_path), KanLMConfig)
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_the_headless_model_loads_too(tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert isinstance(loaded, KanLMModel)
    expected = model.model(tokens()).last_hidden_state
    assert torch.equal(loaded(tokens()).last_hidden_state, expected)


def test_loaded_knots_are_those_saved(tmp_path: Path) -> None:
    model = make(feed_forward="kan-local")
    knots = model.get_buffer("model.layers.0.feed_forward.up.basis.knots")
    knots.mul_(1.25)
    model.save_pretrained(tmp_path)
    loaded = KanLMForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(
        loaded.get_buffer("model.layers.0.feed_forward.up.basis.knots"), knots, rtol=0, atol=0
    )
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_a_checkpoint_with_gaps_is_filled_and_not_overwritten(tmp_path: Path) -> None:
    """Also where one module holds both a loaded tensor and a missing one."""
    model = make(feed_forward={"kind": "kan-local"})
    block = "model.layers.1.feed_forward"
    lost = [
        f"{block}.up.base_weight",
        f"{block}.norm.weight",
        f"{block}.down.coefficients",
        f"{block}.down.basis.knots",
    ]
    state = model.state_dict()
    expected_spread = {name: state[name].std() for name in (lost[0], lost[2])}
    kept = {name: value for name, value in state.items() if name not in lost}
    assert f"{block}.up.coefficients" in kept
    model.save_pretrained(tmp_path, state_dict=kept)
    loaded = KanLMForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, value in kept.items():
        assert torch.equal(loaded[name], value), name
    assert torch.equal(loaded[lost[1]], torch.ones_like(loaded[lost[1]]))
    assert torch.equal(loaded[lost[3]], state[lost[3]])
    for name, spread in expected_spread.items():
        torch.testing.assert_close(loaded[name].std(), spread, rtol=0.2, atol=0)


def test_no_parameter_is_left_uninitialised(model: KanLMForCausalLM) -> None:
    """Fill everything with NaN, start the model as transformers does, and look by name."""
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(torch.nan)
    for module in model.modules():
        module.__dict__.pop("_is_hf_initialized", None)
    model.initialize_weights()
    left = [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]
    assert left == []


def test_the_embedding_resets_itself_to_the_models_start() -> None:
    """So that a loop of its own can start a model module by module."""
    table = make(feed_forward=KAN, vocab_size=500).model.embed_tokens
    torch.nn.init.zeros_(table.weight)
    table.reset_parameters()
    assert table.weight.square().sum(-1).mean().item() == pytest.approx(1, rel=0.05)


def test_generating_with_a_cache_equals_without(model: KanLMForCausalLM) -> None:
    prompt = tokens(batch=2, length=7)
    options: dict[str, Any] = {"max_new_tokens": 12}
    cached = generate(model, prompt, use_cache=True, **options)
    assert torch.equal(cached, generate(model, prompt, use_cache=False, **options))
    assert cached.shape[1] > 7


def test_a_cache_filled_in_parts_gives_the_logits_of_one_pass(model: KanLMForCausalLM) -> None:
    ids = tokens()
    whole = model(ids).logits
    first = model(ids[:, :9], use_cache=True)
    second = model(ids[:, 9:10], past_key_values=first.past_key_values, use_cache=True)
    third = model(ids[:, 10:], past_key_values=second.past_key_values, use_cache=True)
    parts = torch.cat([first.logits, second.logits, third.logits], dim=1)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


def test_left_padded_batches_generate_what_single_prompts_do(model: KanLMForCausalLM) -> None:
    prompts = [tokens(1, length, seed)[0] for length, seed in ((3, 2), (8, 3), (5, 4))]
    width = max(map(len, prompts))
    padded = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(padded)
    for row, prompt in enumerate(prompts):
        padded[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    options: dict[str, Any] = {"max_new_tokens": 10, "pad_token_id": 0}
    together = generate(model, padded, attention_mask=mask, **options)
    for row, prompt in enumerate(prompts):
        alone = generate(model, prompt[None], **options)[0, len(prompt) :]
        assert torch.equal(together[row, width : width + len(alone)], alone)


@pytest.mark.parametrize("training", [False, True])
def test_no_token_sees_a_later_one(model: KanLMForCausalLM, training: bool) -> None:
    """The gradient of the logits at place t reaches exactly the embeddings up to t."""
    model.train(training)
    embedded = model.model.embed_tokens(tokens(1, 12)).detach().requires_grad_()
    logits = model(inputs_embeds=embedded).logits
    for t in range(12):
        (gradient,) = torch.autograd.grad(logits[0, t].square().sum(), embedded, retain_graph=True)
        reached = gradient[0].abs().sum(-1) > 0
        assert reached.tolist() == [place <= t for place in range(12)]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("use_cache", [False, True, None])
@pytest.mark.parametrize("feed_forward", [MIXED, [MOE, CONVOLVED]], ids=["tokens", "context"])
def test_documents_are_apart_where_positions_restart(
    implementation: str, use_cache, feed_forward: list
) -> None:
    model = make(feed_forward=feed_forward, attn_implementation=implementation)
    documents = [tokens(1, length, seed) for length, seed in ((5, 1), (1, 2), (11, 3))]
    packed = torch.cat(documents, dim=1)
    positions = torch.cat([torch.arange(d.shape[1]) for d in documents]).unsqueeze(0)
    together = model(packed, position_ids=positions, use_cache=use_cache).logits
    apart = torch.cat([model(document).logits for document in documents], dim=1)
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)
    # The rows of one batch hold documents of different lengths.
    other = model(
        torch.cat([packed, packed]),
        position_ids=torch.cat([positions, torch.arange(17).unsqueeze(0)]),
    ).logits
    torch.testing.assert_close(other[:1], apart, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(other[1:], model(packed).logits, rtol=1e-4, atol=1e-5)


def test_shifted_labels_score_what_labels_do() -> None:
    model, ids = make(), tokens()
    following = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], dim=1)
    expected = model(ids, labels=ids).loss
    torch.testing.assert_close(model(ids, shift_labels=following).loss, expected)
    logits = model(ids).logits[:, :-1].flatten(0, 1)
    by_hand = -logits.log_softmax(-1).gather(1, ids[:, 1:].reshape(-1, 1)).mean()
    torch.testing.assert_close(expected, by_hand)


def test_items_in_the_batch_divide_the_summed_loss() -> None:
    model, ids = make(), tokens(4)
    labels = ids.clone()
    labels[0, 3:9] = -100
    count = (labels[:, 1:] != -100).sum()
    whole = model(ids, labels=labels).loss
    parts = [
        model(ids[rows], labels=labels[rows], num_items_in_batch=count).loss
        for rows in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close(torch.stack(parts).sum(), whole)


def test_auxiliary_losses_are_in_the_loss_of_training_only() -> None:
    model, ids = make(feed_forward=MOE), tokens()
    evaluated = model(ids, labels=ids)
    assert evaluated.auxiliary_loss is None
    model.train()
    # With room for all tokens, nothing else differs.
    for module in model.modules():
        if isinstance(module, MoE):
            module.capacity_factor = None
    trained = model(ids, labels=ids)
    # Two layers, each about 0.01 · 1 and 0.001 · (ln 4)².
    assert 0.02 < trained.auxiliary_loss < 0.04
    torch.testing.assert_close(trained.loss - trained.auxiliary_loss, evaluated.loss)
    assert model(ids).auxiliary_loss is None
    assert make()(ids, labels=ids).auxiliary_loss is None


def test_auxiliary_losses_weigh_as_much_as_their_tokens() -> None:
    """A z-loss is a mean over tokens, so that its parts make up the whole."""
    model = make(feed_forward={**MOE, "balance_loss": 0.0, "router_z_loss": 1.0}).train()
    ids = tokens(4)
    labels = torch.roll(ids, -1, dims=1)
    whole = model(ids, shift_labels=labels, num_items_in_batch=labels.numel())
    torch.testing.assert_close(whole.auxiliary_loss, model(ids, shift_labels=labels).auxiliary_loss)
    parts = [
        model(ids[rows], shift_labels=labels[rows], num_items_in_batch=labels.numel())
        for rows in (slice(0, 1), slice(1, 4))
    ]
    for name in ("loss", "auxiliary_loss"):
        torch.testing.assert_close(sum(part[name] for part in parts), whole[name])
    short = labels.clone()
    short[:, 12:] = -100
    halved = model(ids, shift_labels=short, num_items_in_batch=labels.numel()).auxiliary_loss
    torch.testing.assert_close(halved, whole.auxiliary_loss / 2)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_float64_is_never_narrowed(model: KanLMForCausalLM, implementation: str) -> None:
    """Every tensor a module returns is float64, and what they compute shows it."""
    ids = tokens()
    rough = model(ids, labels=ids)
    model.double().set_attn_implementation(implementation)
    dtypes = set()

    def note(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            dtypes.add(output.dtype)

    for module in model.modules():
        module.register_forward_hook(note)
    exact = model(ids, labels=ids)
    assert dtypes == {torch.float64}
    assert exact.loss.dtype == torch.float64
    difference = (exact.logits - rough.logits).abs().max()
    assert 1e-9 < difference < 1e-3
    # Of a narrowing anywhere, a change of 1e-12 would leave nothing, or 1e-8.
    embedded = model.model.embed_tokens(ids)
    moved = (
        model(inputs_embeds=embedded * (1 + 1e-11)).logits - model(inputs_embeds=embedded).logits
    )
    assert 0 < moved.abs().max() < 1e-9


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_gradients_are_the_same(model: KanLMForCausalLM, use_reentrant: bool) -> None:
    ids = tokens()

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    model.train()
    plain = gradients()
    calls = []
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.get_submodule("model.layers.0.feed_forward").register_forward_pre_hook(
        lambda *_: calls.append(1)
    )
    for mine, expected in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(mine, expected)
    assert len(calls) == 2, "the block was not run again in backward"


def test_dropout_acts_in_training_only() -> None:
    model, ids = make(dropout=0.5), tokens()
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)


def test_hidden_states_and_attentions_are_recorded() -> None:
    model = make(attn_implementation="eager")
    outputs = model(tokens(), output_hidden_states=True, output_attentions=True)
    assert len(outputs.hidden_states) == 3
    assert [tuple(a.shape) for a in outputs.attentions] == [(2, 4, 24, 24)] * 2
    torch.testing.assert_close(outputs.attentions[0].sum(-1), torch.ones(2, 4, 24))


@pytest.mark.parametrize("kind", ["gelu", "relu2", "swiglu", "kan", "moe", "conv-kan"])
def test_the_stream_starts_with_even_steps(kind: str) -> None:
    """All blocks together add a variance of about 1 at the start, and logits are small."""
    torch.manual_seed(0)
    config = KanLMConfig(
        vocab_size=200, d_model=128, n_layers=6, feed_forward={"kind": kind}, context_length=8
    )
    model = KanLMForCausalLM(config)
    ids = torch.randint(0, 200, (8, 8))
    outputs = model(ids, output_hidden_states=True)
    added = outputs.hidden_states[-2] - outputs.hidden_states[0]
    assert 0.3 < added.square().mean() < 1.2
    # ln 200 = 5.3: the start knows nothing, and does not think otherwise.
    assert 5.2 < model(ids, labels=ids).loss < 6.1


def test_one_step_learns_and_tied_weights_stay_tied() -> None:
    model, ids = make(), tokens()
    before = model(ids, labels=ids).loss
    before.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert model(ids, labels=ids).loss < before
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("feed_forward", [MIXED, [MOE, CONVOLVED]], ids=["tokens", "context"])
def test_compiled_without_a_break_it_computes_the_same(feed_forward: list, training: bool) -> None:
    """The loss, and in training every gradient."""
    model = make(feed_forward=feed_forward).double().train(training)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = []
    for function in (model, compiled):
        with torch.set_grad_enabled(training):
            loss = function(input_ids=tokens(), shift_labels=tokens()).loss
        gradients = torch.autograd.grad(loss, list(model.parameters())) if training else ()
        found.append([loss, *gradients])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


def test_a_cache_by_another_name_is_refused() -> None:
    model, ids = make(), tokens()
    with pytest.raises(ValueError, match="cache: give it as past_key_values"):
        model(ids, cache=model(ids, use_cache=True).past_key_values)
