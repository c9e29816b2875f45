"""What a plan says of layouts, operations, time and remedies."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kanlm.cli import main
from kanlm.config import Config, from_tree, to_yaml
from kanlm.errors import UserError
from kanlm.experiments.planning.memory import cache_bytes, memory
from kanlm.experiments.planning.run import Devices, plan
from kanlm.model import KanLMConfig, KanLMForCausalLM
from kanlm.model.accounting import account
from kanlm.training.resolve import resolve

ONE = Devices("h100", 1)


@pytest.fixture
def config(tmp_path: Path, make_tree) -> Config:
    tree = make_tree(
        tmp_path,
        model={"d_model": 64, "feed_forward": "gelu", "n_kv_heads": 1, "dropout": 0.0},
        training={"batch_size": 16},
    )
    return resolve(from_tree(tree))


def test_operations_are_those_that_torch_counts(config: Config):
    """The counter knows products only, which are nearly all."""
    model = KanLMForCausalLM(KanLMConfig.from_settings(config.model, 257))
    tokens = torch.zeros(2, 16, dtype=torch.long)
    # Eagerly, so that scores count once in forward and twice in backward; causal ones half.
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, labels=tokens).loss.backward()
    accounting = account(config.model, 257)
    scores = 3 * accounting.flops_per_token["attention_scores"] / 2
    planned = tokens.numel() * (accounting.training_flops_per_token + scores)
    assert planned == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_the_cache_is_that_of_generation(config: Config):
    settings = KanLMConfig.from_settings(config.model, 257)
    model = KanLMForCausalLM(settings).eval()
    with torch.no_grad():
        cache = model(torch.zeros(1, 16, dtype=torch.long), use_cache=True).past_key_values
    held = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    assert cache_bytes(settings, 16) == held


def test_layouts_share_what_they_say(config: Config):
    held = plan(config, Devices("h100", 16, node=8)).memory
    ddp, full, hybrid = (held[each] for each in ("DDP", "FSDP2 full", "FSDP2 hybrid"))
    alone = memory(config, 257, "one device", devices=16, node_devices=8)
    assert (ddp.parameters, ddp.optimizer) == (alone.parameters, 2 * alone.parameters)
    # Buckets are one more copy of the gradients.
    assert ddp.peak == alone.peak + alone.parameters
    # Rows that do not divide leave the first process some more.
    assert full.parameters == pytest.approx(alone.parameters / 16, rel=0.05)
    assert hybrid.optimizer == pytest.approx(alone.optimizer / 8, rel=0.05)
    assert full.activations == ddp.activations


def test_time_is_operations_over_a_share_of_the_peak(config: Config):
    slow, fast = (plan(config, Devices("h100", 8, utilisation=u)) for u in (0.1, 0.4))
    assert slow.seconds_per_step == pytest.approx(4 * fast.seconds_per_step)
    assert fast.seconds_per_step == pytest.approx(fast.flops_per_step / (8 * 0.4 * 66.9e12))
    recomputed = replace(config.training, activation_checkpointing=True)
    more = plan(replace(config, training=recomputed), Devices("h100", 8, utilisation=0.4))
    assert more.flops_per_step == fast.flops_per_step
    assert 1.2 < more.seconds_per_step / fast.seconds_per_step < 4 / 3


def test_what_does_not_fit_gets_remedies_that_need_less(config: Config):
    large = replace(
        config,
        model=replace(config.model, vocab_size=50_000, d_model=1024, context_length=2048),
        training=replace(config.training, batch_size=256),
    )
    large = resolve(replace(large, model=replace(large.model, feed_forward={"kind": "gelu"})))
    found = plan(large, Devices("l4", 4))
    assert not found.fits
    peak = found.memory["DDP"].peak
    assert {name.split("=")[0] for name in found.remedies} >= {
        "training.micro_batch_size",
        "training.precision",
        "training.activation_checkpointing",
    }
    assert all(needed < peak for needed in found.remedies.values())
    fitting = [n for n, needed in found.remedies.items() if needed <= found.devices.usable_bytes]
    assert fitting
    size = next(int(n.split("=")[1]) for n in found.remedies if "micro" in n)
    tried = replace(large, training=replace(large.training, micro_batch_size=size))
    assert (
        plan(tried, Devices("l4", 4)).memory["DDP"].peak
        == found.remedies[f"training.micro_batch_size={size}"]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "h2000"], "--gpu h2000 is unknown; did you mean 'h200'?"),
        (["--gpus", "3"], "training.batch_size = 16 does not divide among 3 GPUs"),
        (["--gpus", "12"], "--gpus 12: expected a multiple of the 8 of a machine"),
        (["--utilisation", "1.5"], "--utilisation 1.5: expected more than 0, at most 1"),
        (["--gpus", "2", "training.sharding=hybrid"], "expected none or full"),
        (["training.precision=fp64"], "the table has no peak of h100 at it"),
    ],
)
def test_impossible_plans_are_refused(config: Config, tmp_path, arguments, message, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(path), *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_the_command_line_prints_a_plan(config: Config, tmp_path: Path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    main(["plan", str(path), "--gpus", "16", "--gpu", "h200", "training.sharding=hybrid"])
    text = capsys.readouterr().out
    for part in ("hybrid", "*", "optimizer state", "attention", "peak", "tokens/s", "fits: "):
        assert part.replace(" ", "") in text.replace(" ", "").replace("\n", "")
    with pytest.raises(UserError):
        Devices("h100", 0)
