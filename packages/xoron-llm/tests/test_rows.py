"""Proves that giving a language model new rows changes no text logit by a single bit, in fp32 and
bf16, tied and untied, also while the new rows are set apart and trained under weight decay.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from xoron_core.components import Context
from xoron_core.descriptors import TokenGroup
from xoron_core.errors import UsageError
from xoron_core.losses import text_loss
from xoron_core.nn.split_rows import merge, split
from xoron_core.tokens.space import CodecRange, TextBase, TokenSpace
from xoron_llm.backbone import CausalLMBackbone, XoronMoeBackbone
from xoron_llm.hf_backbone import HfBackbone
from xoron_llm.hf_config import HfConfig
from xoron_llm.moe.config import MoeConfig

TEXT, PADDED, CODES = 60, 68, 24  # ids of the text base, rows of its checkpoint, new codec ids
QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": PADDED,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
}
MOE = {
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_size": 48,
    "num_experts": 4,
    "initializer_range": 0.2,
}


def space(*, codes: int = CODES) -> TokenSpace:
    base = TextBase(name="test/base", size=TEXT, identity="sha256:test")
    group = TokenGroup("test/group", {"begin": "<|begin|>", "end": "<|end|>"})
    codecs = [CodecRange("test/codec", 0, codes, "test", None, "image")] if codes else []
    return TokenSpace.allocate(text=base, groups=[group], codecs=codecs)


def backbone(kind: str, *, tied: bool) -> CausalLMBackbone:
    """A text model before it knows of any code."""
    torch.manual_seed(0)
    context = Context(slot="backbone", space=space(codes=0))
    made: CausalLMBackbone
    if kind == "hf":
        config = HfConfig.parse({"hf_config": {**QWEN3, "tie_word_embeddings": tied}})
        made = HfBackbone(config, context)
    else:
        made = XoronMoeBackbone(MoeConfig.parse({**MOE, "tie_word_embeddings": tied}), context)
    return made.eval()


def logits(of: CausalLMBackbone, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return of.logits(of(of.embed(ids)).hidden)


def draw(seed: int, below: int = TEXT) -> torch.Tensor:
    return torch.randint(below, (2, 13), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["hf", "xoron-moe"])
def test_text_logits_and_old_rows_keep_every_bit(kind: str, tied: bool, dtype: torch.dtype) -> None:
    of, wide = backbone(kind, tied=tied).to(dtype), space()
    text = draw(0)
    before = logits(of, text)[..., :TEXT]
    old = of.model.get_input_embeddings().weight[:TEXT].clone()
    heads = of.model.get_output_embeddings().weight[:TEXT].clone()
    new = wide.new_rows(of.num_rows)
    of.resize_rows(wide.size, new, torch.Generator().manual_seed(1))
    assert torch.equal(logits(of, text)[..., :TEXT], before)
    of.requires_grad_(False)
    rows = split(of.model, new)
    assert len(rows) == 2 - tied
    assert torch.equal(logits(of, text)[..., :TEXT], before)
    optimizer = torch.optim.AdamW(rows, lr=1e-2, weight_decay=0.1)
    losses = []
    for step in range(50):
        ids = draw(step % 5, wide.size)
        optimizer.zero_grad()
        hidden = of(of.embed(ids)).hidden
        term = text_loss(hidden, ids, of.logits, head=of.linear_head())
        mean = term.sum / term.count
        mean.backward()
        optimizer.step()
        losses.append(mean.item())
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5]), "the rows learned nothing"
    assert torch.equal(logits(of, text)[..., :TEXT], before)
    with pytest.raises(UsageError, match="set apart; merge them before resizing"):
        of.resize_rows(200, new, torch.Generator())
    merge(of.model)
    assert torch.equal(logits(of, text)[..., :TEXT], before)
    assert torch.equal(of.model.get_input_embeddings().weight[:TEXT], old)
    assert torch.equal(of.model.get_output_embeddings().weight[:TEXT], heads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_published_row_counts_change_no_text_logit(dtype: torch.dtype) -> None:
    """151,936 rows of a checkpoint for 151,669 ids, grown to 164,021; a narrow model for speed."""
    torch.manual_seed(0)
    config = Qwen3Config(**{**QWEN3, "vocab_size": 151_936, "tie_word_embeddings": True})
    narrow = Qwen3ForCausalLM(config).eval().to(dtype)
    hf_config = HfConfig.parse({"hf_config": config.to_dict()})
    wide = HfBackbone(hf_config, Context(slot="backbone", space=space())).eval().to(dtype)
    wide.model.load_state_dict(narrow.state_dict())
    wide.resize_rows(164_021, torch.arange(151_669, 164_021), torch.Generator().manual_seed(1))
    assert wide.num_rows == 164_021
    for length in (1, 13):
        ids = torch.randint(151_669, (2, length), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            before = narrow(ids).logits
        assert torch.equal(logits(wide, ids)[..., :151_669], before[..., :151_669])
        assert not torch.equal(logits(wide, ids)[..., 151_669:151_936], before[..., 151_669:])
