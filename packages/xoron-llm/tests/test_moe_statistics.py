"""What routers observe reaches the selection biases once per step, however the step is computed.

Statistics are the same with activations recomputed, with a batch split into micro-batches and with
padding; `XoronModel` carries them by slot and hands them back; a frozen router keeps its bias; the
losses of the router are counted before the forward pass as they are in it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import xoron_core
from xoron_core.model import XoronModel

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_size": 48,
    "num_experts": 6,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}


def _compose(**changes: Any) -> XoronModel:
    composition = {
        "name": "small",
        "tokenizer": {"use": "byte"},
        "backbone": {"use": "xoron-moe", **SIZES, **changes},
        "tokens": {"groups": ["control", "conversation"]},
    }
    return xoron_core.compose(composition, plugins=["llm"], seed=0)[0]


def _batch(rows: int = 4, length: int = 12) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(5))
    documents = torch.ones_like(ids)
    documents[:, length // 2 :] = 2
    documents[0, -3:] = documents[2, -7:] = 0
    return {
        "input_ids": ids,
        "labels": ids.masked_fill(documents == 0, -100),
        "document_ids": documents,
    }


def _observed(model: XoronModel, **batch: torch.Tensor) -> dict[str, torch.Tensor]:
    output = model(**batch)
    assert output.statistics.keys() == {"backbone"}
    return output.statistics["backbone"]


@pytest.mark.parametrize("attention", ["gqa", "latent"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputing_activations_observes_the_same(attention: str, reentrant: bool) -> None:
    changes = {"attention": attention, "num_kv_heads": None, "kv_lora_rank": 16}
    kept, recomputed = _compose(**changes).train(), _compose(**changes).train()
    recomputed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        recomputed.enable_input_require_grads()
    calls: list[int] = []
    blocks = recomputed.backbone.model.model.moe_blocks()
    blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    expected, output = _observed(kept, **_batch()), recomputed(**_batch())
    output.loss.backward()
    assert len(calls) == 2
    got = output.statistics["backbone"]
    assert got.keys() == expected.keys() == {"load", "tokens", "entropy"}
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor)
        assert not tensor.requires_grad
    recomputed.after_optimizer_step(output.statistics)
    kept.after_optimizer_step({"backbone": expected})
    a, b = kept.state_dict(), recomputed.state_dict()
    biases = [name for name in a if "selection_bias" in name]
    assert len(biases) == 2
    for name in biases:
        assert torch.equal(a[name], b[name])
        moved = a[name][a[name] != 0].abs()
        assert len(moved) > 0
        torch.testing.assert_close(moved, torch.full_like(moved, 1e-3))


def test_micro_batches_add_up_to_the_batch() -> None:
    model, batch = _compose().train(), _batch()
    whole = _observed(model, **batch)
    halves = [
        _observed(model, **{name: tensor[part] for name, tensor in batch.items()})
        for part in (slice(0, 1), slice(1, 4))
    ]
    for name, tensor in whole.items():
        torch.testing.assert_close(halves[0][name] + halves[1][name], tensor)
    valid = int((batch["document_ids"] != 0).sum())
    assert whole["tokens"].tolist() == [valid, valid]
    assert whole["load"].shape == (2, 6)
    assert whole["load"].sum(-1).tolist() == [2 * valid, 2 * valid]


def test_evaluation_observes_nothing_and_metrics_name_the_layers() -> None:
    model, batch = _compose().eval(), _batch()
    assert model(**batch).statistics is None
    seen = _observed(model.train(), **batch)
    metrics = model.backbone.metrics(seen)
    names = ("max_load", "min_load", "entropy", "dropped")
    assert list(metrics) == [f"layer{index}/{name}" for index in (1, 3) for name in names]
    assert metrics["layer1/max_load"] == pytest.approx(
        float(seen["load"][0].max() / seen["load"][0].mean())
    )
    assert 0 < metrics["layer3/entropy"] < 1
    assert metrics["layer1/dropped"] == metrics["layer3/dropped"] == 0


def test_modalities_are_measured_apart_and_balanced_together() -> None:
    """Two groups whose embeddings are opposite, so that they prefer different experts."""
    model, twin, batch = _compose().train(), _compose().train(), _batch()
    backbone = model.backbone
    backbone.group_names = ("text", "image", "audio")
    documents = batch["document_ids"]
    groups = torch.zeros_like(documents)
    groups[:, 4:9] = 1
    embeds = torch.randn(32) * 5 + torch.randn(*documents.shape, 32)
    embeds = torch.where(groups[..., None] == 1, -embeds, embeds)
    seen = backbone(embeds, document_ids=documents, position_groups=groups).statistics
    plain = twin.backbone(embeds, document_ids=documents).statistics
    assert seen["load"].shape == (2, 3, 6)
    assert torch.equal(seen["load"].sum(1), plain["load"])
    first = seen["load"][0, :2]
    assert (first / first.sum(-1, keepdim=True)).diff(dim=0).abs().sum() > 0.5
    metrics, together = backbone.metrics(seen), twin.backbone.metrics(plain)
    assert {name: metrics[name] for name in together} == pytest.approx(together)
    for index, name in enumerate(("text", "image")):
        load = seen["load"][1, index]
        assert metrics[f"layer3/{name}/max_load"] == pytest.approx(float(load.max() / load.mean()))
        counted = int(((groups == index) & (documents != 0)).sum())
        assert float(seen["tokens"][1, index]) == counted
        assert metrics[f"layer3/{name}/dropped"] == 0
    assert not any("audio" in name for name in metrics)
    lost = {**seen, "load": seen["load"] - (seen["load"] > 3).float()}
    assert backbone.metrics(lost)["layer1/image/dropped"] == int((first[1] > 3).sum()) > 0
    for part, stats in ((backbone, seen), (twin.backbone, plain)):
        part.after_optimizer_step(stats)
    biases = {n: t for n, t in model.state_dict().items() if "selection_bias" in n}
    assert all(torch.equal(twin.state_dict()[n], t) and t.any() for n, t in biases.items())


def test_a_frozen_router_keeps_its_bias() -> None:
    model = _compose().train()
    first, second = (block.router for block in model.backbone.model.model.moe_blocks())
    first.weight.requires_grad_(False)
    model.after_optimizer_step({"backbone": _observed(model, **_batch())})
    assert first.selection_bias.abs().sum() == 0
    assert second.selection_bias.abs().sum() > 0


def test_the_bias_is_saved_with_the_model(tmp_path) -> None:
    composition = {
        "tokenizer": {"use": "byte"},
        "backbone": {"use": "xoron-moe", **SIZES},
        "tokens": {"groups": ["control", "conversation"]},
    }
    model, processor = xoron_core.compose(composition, plugins=["llm"], seed=0)
    batch = _batch()
    for block in model.backbone.model.model.moe_blocks():
        block.router.selection_bias.normal_()
    xoron_core.save(model, processor, tmp_path)
    again, _ = xoron_core.load(tmp_path)
    wanted = {name: t for name, t in model.state_dict().items() if "selection_bias" in name}
    assert len(wanted) == 2
    for name, tensor in wanted.items():
        assert torch.equal(again.state_dict()[name], tensor)
    ids = {"input_ids": batch["input_ids"]}
    assert torch.equal(again.eval()(**ids).logits, model.eval()(**ids).logits)


@pytest.mark.parametrize("training", [False, True])
def test_router_losses_are_counted_before_as_in_the_forward_pass(training: bool) -> None:
    model, batch = _compose(balance_loss_coef=0.5, router_z_loss_coef=0.25), _batch()
    batch["document_ids"][3] = 0
    batch["labels"][3] = -100
    model.train(training)
    losses, counts = model(**batch).losses, model.loss_counts(batch)
    assert losses.keys() == counts.keys() == {"text", "backbone/balance", "backbone/z"}
    for name, count in counts.items():
        assert float(count) == float(losses[name].count) > 0
    assert float(counts["backbone/balance"]) == 3 * 2  # rows that hold a token, two layers
    assert float(counts["backbone/z"]) == 2 * int((batch["document_ids"] != 0).sum())
    plain = _compose()(**batch).losses
    assert plain.keys() == {"text"}
    routers = [block.router.weight for block in model.backbone.model.model.moe_blocks()]
    for name in ("backbone/balance", "backbone/z"):
        gradients = torch.autograd.grad(losses[name].sum, routers, retain_graph=True)
        assert all(gradient.abs().max() > 0 for gradient in gradients)
    doubled = _compose(balance_loss_coef=1.0, router_z_loss_coef=0.5)(**batch).losses
    for name in ("backbone/balance", "backbone/z"):
        torch.testing.assert_close(doubled[name].sum, 2 * losses[name].sum)


def test_a_training_loop_evens_out_the_load() -> None:
    """Through the model's own road, on skewed text: few bytes, some far more frequent."""
    ratios = {}
    for speed in (0.0, 0.003):
        model = _compose(
            bias_update_speed=speed, num_experts=8, num_layers=2, initializer_range=0.02
        ).train()
        # Skewed: a large common component of all embeddings decides every choice.
        with torch.no_grad():
            model.backbone.model.get_input_embeddings().weight += 0.1 * torch.randn(
                32, generator=torch.Generator().manual_seed(2)
            )
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
        rng = torch.Generator().manual_seed(3)
        frequency = 1.0 / torch.arange(4, 68)
        seen = []
        for _ in range(200):
            ids = torch.multinomial(frequency.expand(16, -1), 32, replacement=True, generator=rng)
            output = model(input_ids=ids, labels=ids)
            output.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            model.after_optimizer_step(output.statistics)
            seen.append(output.statistics["backbone"]["load"])
        load = torch.stack(seen[-20:]).sum(0)
        ratios[speed] = (load.max(-1).values / load.mean(-1)).tolist()
    assert min(ratios[0.0]) > 2
    assert max(ratios[0.003]) < 1.3
