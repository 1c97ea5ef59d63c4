"""Proves that a composed model over a sequence shared by two processes trains as in one.

Text and a medium, read in the sequence and by a fusion, with experts observed per modality: loss,
counts, statistics and the gradient of every parameter are those of one process, on every rank. What
cannot be shared is refused on all of them.
"""

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from xoron_core.errors import SequenceError
from xoron_core.nn.context_parallel import deparallelize, parallelize, sum_gradients, unshard

TOY = Path(__file__).parent / "toy"
WORLD = 2
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def build(**slots):
    """The same model on every process, with no weight at zero."""
    import xoron_core

    parts = {"encoder": {"use": "signal-encoder"}, "projector": {"use": "signal-projector"}}
    model, processor = xoron_core.compose(
        {
            "signal": {**parts, **slots},
            "tokenizer": {"use": "byte"},
            "backbone": {"use": "xoron-moe", "preset": "tiny", "num_layers": 2},
            "fusion": {"use": "cross-attention", "num_heads": 4},
            "tokens": {"groups": ["control", "conversation"]},
        }
    )
    with torch.no_grad():
        for block in model.fusion.adapters:
            block.o_proj.weight.fill_(0.05)
    return model.train(), processor


def batch_of(processor, answer="a wave"):
    heard = [
        {"type": "text", "text": "listen"},
        {"type": "signal", "signal": torch.arange(16.0).sin().numpy()},
    ]
    messages = [{"role": "user", "content": heard}, {"role": "assistant", "content": answer}]
    return processor(messages, train=True)


def train(model, batch):
    output = model(**batch)
    counts = model.loss_counts(batch)
    assert {name: float(term.count) for name, term in output.losses.items()} == {
        name: float(count) for name, count in counts.items()
    }
    return output


def work(rank, folder, path):
    sys.path[:0] = path
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD
    )
    model, processor = build()
    batch = batch_of(processor)
    local = train(model, batch)
    local.losses["text"].sum.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    hidden = model(**batch).hidden.detach()
    model.zero_grad()

    parallelize(model)
    shared = train(model, batch)
    assert shared.hidden.shape[1] < hidden.shape[1]
    length = hidden.shape[1]
    torch.testing.assert_close(unshard(shared.hidden, length), hidden, **CLOSE)
    term = shared.losses["text"]
    total = torch.stack([term.sum.detach(), term.count])
    dist.all_reduce(total)
    torch.testing.assert_close(total, torch.stack(local.losses["text"][:2]).detach(), **CLOSE)
    for name, stat in shared.statistics["backbone"].items():
        dist.all_reduce(stat)
        torch.testing.assert_close(stat, local.statistics["backbone"][name], **CLOSE)
    told = model.backbone.metrics(shared.statistics["backbone"])
    assert {"layer1/max_load", "layer1/signal/max_load", "layer1/dropped"} <= told.keys()
    assert told["layer1/dropped"] == 0
    term.sum.backward()
    sum_gradients(model)
    for name, parameter in model.named_parameters():
        if expected[name] is None:
            assert parameter.grad is None, name
            continue
        torch.testing.assert_close(parameter.grad, expected[name], **CLOSE, msg=name)
        assert "fusion" not in name or expected[name].any(), name

    documents = torch.ones_like(batch["input_ids"])
    documents[:, 4:] = 2
    with pytest.raises(SequenceError, match="no documents"):
        model(**{**batch, "document_ids": documents})
    deparallelize(model)
    torch.testing.assert_close(model(**batch).hidden.detach(), hidden)
    generating, processor = build(
        autoencoder={"use": "signal-autoencoder"}, generator={"use": "signal-generator"}
    )
    drawn = [{"type": "signal", "signal": torch.arange(16.0).sin().numpy()}]
    legal_loss_is_shared(*build(codec={"use": "signal-codec"}), drawn)
    with pytest.raises(SequenceError, match=r"signal\.generator: a generator reads"):
        parallelize(generating)(**batch_of(processor, drawn))
    dist.destroy_process_group()


def legal_loss_is_shared(model, processor, drawn):
    """The loss over the ids of a codebook alone, whole and as the sum of two shares."""
    batch = batch_of(processor, drawn)
    whole, illegal = (model(**batch, legal=each).losses["text"].sum for each in (True, False))
    assert whole < illegal - 0.1
    parallelize(model)
    share = model(**batch, legal=True).losses["text"].sum.detach().clone()
    assert not torch.isclose(share, whole)
    dist.all_reduce(share)
    torch.testing.assert_close(share, whole.detach(), **CLOSE)


@pytest.mark.slow
def test_a_shared_sequence_trains_as_a_whole_one(tmp_path):
    path = [str(TOY), *sys.path]
    mp.start_processes(work, args=(str(tmp_path), path), nprocs=WORLD, start_method="spawn")
