"""Speculative decoding: a small model drafts, the model checks several ids in one pass.

Greedy text is what the model says alone, for any draft. Sampled text has the model's own
distribution: a drafted id x is accepted with probability min(1, p(x) / q(x)), and a rejected one is
replaced by a draw from max(0, p - q), normalised (Leviathan et al. 2023; Chen et al. 2023). p and q
are the distributions of model and draft after the same mask, penalty and truncation.

Rows accept different numbers of ids. Columns that every row rejects are taken out of both caches;
a column that only some reject is masked for those, and takes no position there.

Footguns:
- A seed gives another text than without a draft (of the same distribution): draws are spent
  differently.
- The draft reads text alone: where media stand it sees their placeholders. That costs acceptance,
  never correctness.

Shapes: B rows, C columns so far, K drafted ids, V rows of the token space.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from xoron_core.caches import Lane, cut_by_columns
from xoron_core.decoding import Decoder
from xoron_core.errors import CompositionError, ConfigError
from xoron_core.events import Event
from xoron_core.model import XoronModel
from xoron_core.sampling import draw


def check_draft(model: XoronModel, draft: XoronModel, *, count: int) -> None:
    """Refuses a draft that cannot speak for the model.

    Raises:
        TokenSpaceError: if its ids mean something else.
        PluginError: if it has no backbone.
        ConfigError: if it should draft no id at all.
    """
    draft.need_backbone()
    assert model.space is not None
    assert draft.space is not None
    model.space.require_same(draft.space.hash, where="the draft model")
    if count < 1:
        raise ConfigError(f"draft_tokens {count}: expected 1 or more")


def run(decoder: Decoder, draft: Lane, count: int, *, logits: Tensor) -> Iterator[Event]:
    """Decodes text until every row has ended.

    Args:
        decoder: of a request that makes text only, with the prompt in its lane.
        draft: the draft model, with nothing cached.
        count: K.
        logits: (B, 1, V) of the prompt's last position.

    Raises:
        CompositionError: if a cache cannot give positions back.
    """
    _need_crop(decoder.lane, "the model")
    scores = decoder.allowed(logits[:, -1])
    picks = draw(decoder.warp(scores), decoder.generators)
    infos = decoder.certainty(scores, picks)
    for index, token in enumerate(picks.tolist()):
        yield from decoder.take(index, token, infos[index])
    while not all(row.done for row in decoder.rows):
        _append(decoder, picks)
        columns = decoder.ids.shape[1]
        ids, mask, drafts = _propose(decoder, draft, count)
        output = decoder.lane.run(mask, input_ids=ids[:, decoder.lane.length :], keep=count + 1)
        rounds = [decoder.allowed(output.logits[:, j]) for j in range(count + 1)]
        warped = [
            decoder.warp(rounds[j], ids[:, : columns + j], mask[:, : columns + j])
            for j in range(count + 1)
        ]
        agreed, picks = _accept(decoder, warped, drafts, ids[:, columns:])
        chosen = torch.cat([ids[:, columns:], picks[:, None]], dim=1)
        chosen.scatter_(1, torch.tensor(agreed, device=ids.device)[:, None], picks[:, None])
        infos_by_round = [decoder.certainty(rounds[j], chosen[:, j]) for j in range(count + 1)]
        running = [index for index, row in enumerate(decoder.rows) if not row.done]
        _keep_columns(decoder, draft, ids, mask, agreed=agreed, running=running, columns=columns)
        for index in running:
            row = decoder.rows[index]
            row.drafted += count
            row.accepted += agreed[index]
            for j, token in enumerate(chosen[index, : agreed[index] + 1].tolist()):
                yield from decoder.take(index, token, infos_by_round[j][index])
                if row.done:
                    break


def _need_crop(lane: Lane, what: str) -> None:
    if not cut_by_columns(lane.cache, lane.length):
        raise CompositionError(
            f"{what} does not keep every position (sliding or linear attention), so ids that are"
            " not accepted cannot be taken out of its cache; use a session without draft"
        )


def _append(decoder: Decoder, picks: Tensor) -> None:
    """The ids just chosen become a column; rows that have ended do not own it."""
    runs = [not row.done for row in decoder.rows]
    column = decoder.mask.new_tensor(runs)[:, None]
    decoder.ids = torch.cat([decoder.ids, picks[:, None]], dim=1)
    decoder.mask = torch.cat([decoder.mask, column], dim=1)
    decoder.keys.append(int(picks[0]))


def _propose(decoder: Decoder, draft: Lane, count: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Drafts K ids for each row: all columns (B, C + K) with their mask, and K times the draft's
    (B, V) distribution (none when greedy)."""
    ids, mask = decoder.ids, decoder.mask
    runs = mask[:, -1:]
    distributions: list[Tensor] = []
    for _ in range(count):
        first = draft.length == 0
        output = draft.run(mask, input_ids=ids[:, draft.length :])
        if first:
            _need_crop(draft, "the draft model")
        warped = decoder.warp(decoder.allowed(output.logits[:, -1]), ids, mask)
        if decoder.generators is not None:
            distributions.append(_distribution(decoder, warped))
        picks = draw(warped, decoder.generators)
        ids = torch.cat([ids, picks[:, None]], dim=1)
        mask = torch.cat([mask, runs], dim=1)
    return ids, mask, distributions


def _accept(
    decoder: Decoder, warped: list[Tensor], drafts: list[Tensor], proposed: Tensor
) -> tuple[list[int], Tensor]:
    """How many drafted ids each row accepts, and (B,) the id that each says behind them."""
    count = proposed.shape[1]
    if decoder.generators is None:
        best = torch.stack([scores.argmax(-1) for scores in warped], dim=1)
        same = (best[:, :count] == proposed).long().cumprod(-1).sum(-1)
        return same.tolist(), best.gather(1, same[:, None])[:, 0]
    targets = [_distribution(decoder, scores) for scores in warped]
    agreed, picks = [], []
    for index, generator in enumerate(decoder.generators):
        ids = proposed[index].tolist()
        accepted, pick = accept_row(
            [target[index] for target in targets],
            [draft[index] for draft in drafts],
            ids,
            generator,
        )
        agreed.append(accepted)
        picks.append(pick)
    return agreed, proposed.new_tensor(picks)


def accept_row(
    targets: list[Tensor], drafts: list[Tensor], proposed: list[int], generator: torch.Generator
) -> tuple[int, int]:
    """The accept-or-replace rule for one row.

    Args:
        targets: K + 1 distributions p, each (V,), of the model behind 0 .. K drafted ids.
        drafts: K distributions q, each (V,), that the proposed ids were drawn from.
        proposed: K ids.
        generator: for the draws.

    Returns:
        How many ids are accepted, and the id that follows them.
    """
    for j, token in enumerate(proposed):
        p, q = targets[j], drafts[j]
        u = torch.rand((), generator=generator, device=p.device)
        if bool(u * q[token] < p[token]):
            continue
        residual = (p - q).clamp(min=0)
        # Where p and q agree up to rounding there is nothing left over; p itself is then exact.
        weights = residual if bool(residual.sum() > 0) else p
        return j, int(torch.multinomial(weights, 1, generator=generator))
    return len(proposed), int(torch.multinomial(targets[-1], 1, generator=generator))


def _keep_columns(
    decoder: Decoder,
    draft: Lane,
    ids: Tensor,
    mask: Tensor,
    *,
    agreed: list[int],
    running: list[int],
    columns: int,
) -> None:
    """Keeps the columns that any running row accepted, masked for the rows that did not."""
    kept = columns + max(agreed[index] for index in running)
    decoder.lane.crop(decoder.lane.length - kept)
    draft.crop(max(0, draft.length - kept))
    # Ids beyond a row's own are masked; a row that has ended owns none of them anyway.
    own = torch.tensor(agreed, device=mask.device)[:, None] + columns
    column = torch.arange(kept, device=mask.device)[None, :]
    decoder.ids = ids[:, :kept]
    decoder.mask = mask[:, :kept] * (column < own)
    decoder.keys += ids[0, columns:kept].tolist()


def _distribution(decoder: Decoder, scores: Tensor) -> Tensor:
    """(B, V) scores to probabilities in fp32, without rows beyond the token space."""
    return scores[:, : decoder.grammar.space.size].float().softmax(-1)
