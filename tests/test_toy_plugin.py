"""Proves the seams with the plug-in (`tests/toy`, 1-D signals): composed with a backbone
it trains and generates in every direction, on both tracks; without one it composes and trains too.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import xoron_core
from xoron_core.errors import PluginError, SequenceError
from xoron_core.events import Finished, MediaOut
from xoron_core.media import embed, write_codes
from xoron_core.sampling import Sampling
from xoron_core.session import Session

TOY = Path(__file__).parent / "toy"
SIGNAL = {
    "encoder": {"use": "signal-encoder"},
    "projector": {"use": "signal-projector"},
    "codec": {"use": "signal-codec"},
    "autoencoder": {"use": "signal-autoencoder"},
    "generator": {"use": "signal-generator"},
}
TEXT = {
    "tokenizer": {"use": "byte"},
    "backbone": {"use": "xoron-moe", "preset": "tiny", "num_layers": 2},
    "tokens": {"groups": ["control", "conversation"]},
}


@pytest.fixture
def composed(toy):
    return xoron_core.compose({"name": "toy", "signal": SIGNAL, **TEXT})


def wave(k, n=16):
    return torch.sin(torch.arange(n) * 0.3 * (k + 1)).numpy()


def ask(k=0, answer="yes", n=16, **part):
    content = [
        {"type": "text", "text": "rising? "},
        {"type": "signal", "signal": wave(k, n), **part},
    ]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


def tell(k=0, n=16, **part):
    content = [{"type": "signal", "signal": wave(k, n), **part}]
    return [{"role": "user", "content": "a wave"}, {"role": "assistant", "content": content}]


def gradient(part):
    return sum(float(p.grad.abs().sum()) for p in part.parameters() if p.grad is not None)


def test_input_through_the_encoder_changes_the_text_and_gets_gradient(composed):
    model, processor = composed
    model.train()
    output = model(**processor([ask(0), ask(1, n=24)], train=True))
    output.loss.backward()
    assert set(output.losses) == {"text", "signal.generator"}
    assert gradient(model.part("signal.encoder")) > 0
    assert gradient(model.part("signal.projector")) > 0
    assert gradient(model.backbone) > 0


def test_two_signals_give_different_logits_and_no_signal_gives_the_text_only_ones(composed):
    model, processor = composed
    with torch.no_grad():
        first, again, other = (model(**processor(ask(k)[:1])).logits for k in (0, 0, 1))
        batch = processor([{"role": "user", "content": "rising? "}])
        plain = model(**batch).logits
        direct = model.backbone.model(
            batch["input_ids"], attention_mask=batch["attention_mask"]
        ).logits
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 1e-4
    torch.testing.assert_close(plain, direct, rtol=0, atol=0)


def test_placeholder_rows_are_the_projectors_output_bit_for_bit(composed):
    model, processor = composed
    batch = processor([ask(0)[:1], ask(1, n=24)[:1]])
    media = batch["media"]["signal.encoder"]
    embeds = embed(model, batch["media"], input_ids=batch["input_ids"]).embeds
    features = model.part("signal.encoder")(media["patches"], media["mask"])
    tokens = model.part("signal.projector")(features).values
    for item, (row, start, length) in enumerate(media["spans"].tolist()):
        assert torch.equal(embeds[row, start : start + length], tokens[item, :length])
    assert media["spans"][:, 2].tolist() == [4, 6]


def test_output_through_the_generator_trains_generator_and_backbone(composed):
    model, processor = composed
    model.train()
    batch = processor([tell(0), tell(1)], train=True)
    output = model(**batch, seed=3)
    counts = model.loss_counts(batch)
    assert {k: float(v.count) for k, v in output.losses.items()} == {
        k: float(v) for k, v in counts.items()
    }
    output.losses["signal.generator"].sum.backward()
    assert gradient(model.part("signal.generator")) > 0
    assert gradient(model.backbone) > 0
    assert gradient(model.part("signal.autoencoder")) == 0


def test_both_directions_through_the_codec_put_its_ids_into_inputs_and_labels(composed):
    model, processor = composed
    model.train()
    conversation = ask(0, route="codec")[:1] + tell(1, route="codec")[1:]
    batch = processor(conversation, train=True)
    spans = batch["media"]["signal.codec"]["spans"]
    media = {"signal.codec": batch["media"]["signal.codec"]}
    ids, labels = write_codes(model, media, batch["input_ids"], batch["labels"])
    codes = model.part("signal.codec").encode(
        media["signal.codec"]["patches"], media["signal.codec"]["mask"]
    )
    for item, (row, start, length) in enumerate(spans.tolist()):
        index, local = model.space.to_local(ids[row, start : start + length])
        names = [model.space.ranges[i].name for i in index.tolist()]
        assert names == ["xoron-toy/signal-codec:0", "xoron-toy/signal-codec:1"] * (length // 2)
        assert torch.equal(local.view(-1, 2), codes.ids[item, : length // 2])
    asked, told = spans.tolist()
    assert (labels[0, asked[1] : asked[1] + asked[2]] == -100).all()
    assert torch.equal(labels[0, told[1] : told[1] + told[2]], ids[0, told[1] : told[1] + told[2]])
    model(**batch).losses["text"].sum.backward()
    assert gradient(model.backbone) > 0


def test_an_answered_signal_is_input_again_for_later_turns(composed):
    _, processor = composed
    conversation = [*tell(0), {"role": "user", "content": "again?"}]
    plan = processor.plan(conversation, add_generation_prompt=True)
    assert [span.slot for span in plan.spans] == ["signal.generator", "signal.encoder"]
    strings = [processor.tokenizer.convert_ids_to_tokens(int(i)) for i in plan.input_ids]
    first, second = plan.spans
    end = first.start + first.length
    assert strings[end : end + 2] == ["<|/gen_signal|>", "<|signal|>"]
    assert strings[second.start + second.length] == "<|/signal|>"


def test_a_medium_may_stand_under_any_of_its_usual_keys(composed):
    _, processor = composed
    medium = next(p for p in ask(0)[0]["content"] if p["type"] == "signal")["signal"]
    plans = [
        processor.plan([{"role": "user", "content": [{"type": "signal", key: medium}]}])
        for key in ("signal", "path", "url", "data")
    ]
    assert all(len(plan.spans) == 1 for plan in plans)
    assert all(plan.input_ids.equal(plans[0].input_ids) for plan in plans)
    with pytest.raises(SequenceError, match="without 'signal', 'path', 'url' or 'data'"):
        processor.plan([{"role": "user", "content": [{"type": "signal"}]}])


def test_a_wrong_number_of_positions_names_both_counts(composed):
    model, processor = composed
    batch = processor(ask(0)[:1])
    batch["media"]["signal.encoder"]["spans"][0, 2] -= 1
    with pytest.raises(SequenceError, match=r"takes 4 positions.*span has 3"):
        model(**batch)


def test_text_alone_in_training_gives_every_part_a_zero_gradient(composed):
    model, processor = composed
    model.train()
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    output = model(**processor(talk, train=True))
    output.loss.backward()
    for slot in ("signal.encoder", "signal.projector", "signal.generator"):
        grads = [p.grad for p in model.part(slot).parameters()]
        assert all(grad is not None and not grad.any() for grad in grads), slot


def test_saved_and_loaded_it_gives_the_same_logits_and_losses(composed, tmp_path):
    model, processor = composed
    xoron_core.save(model, processor, tmp_path / "m")
    loaded, again = xoron_core.load(tmp_path / "m")
    for batch in (processor([ask(0), ask(1)], train=True), processor(tell(1), train=True)):
        ours, theirs = model(**batch, seed=1), loaded(**batch, seed=1)
        for name, term in ours.losses.items():
            assert torch.equal(term.sum, theirs.losses[name].sum), name
    first = processor(ask(2)[:1])
    assert torch.equal(first["input_ids"], again(ask(2)[:1])["input_ids"])
    assert torch.equal(model(**first).logits, loaded(**first).logits)
    part = xoron_core.load_slot(tmp_path / "m", "signal.projector")
    for ours, theirs in zip(
        model.part("signal.projector").parameters(), part.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("route", ["generator", "codec"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_random_weights_generate_a_legal_signal_and_end(toy, route, temperature):
    model, processor = xoron_core.compose({"signal": {**SIGNAL, "routes": {"out": route}}, **TEXT})
    session = Session(model, processor)
    events = list(
        session.stream(
            [[{"role": "user", "content": "a wave"}], ask(0)[:1]],
            begin_with="signal",
            max_new_tokens=30,
            sampling=Sampling(temperature=temperature, seed=7),
        )
    )
    made = [event for event in events if isinstance(event, MediaOut)]
    assert {event.row for event in made} == {0, 1}
    assert all(torch.isfinite(event.media).all() for event in made)
    lengths = {event.media.shape[-1] for event in made}
    assert lengths <= ({16} if route == "generator" else {4 * k for k in range(1, 7)})
    assert sorted(e.row for e in events if isinstance(e, Finished)) == [0, 1]


def test_rows_of_a_batch_say_what_they_say_alone(composed):
    model, processor = composed
    session = Session(model, processor)
    talks = [ask(0)[:1], [{"role": "user", "content": "hi"}], ask(1, n=24)[:1]]
    options = {"max_new_tokens": 12, "makes": ["signal"]}
    for sampling in (Sampling(), Sampling(temperature=1.5, seed=5)):
        together = session.generate(talks, sampling=sampling, **options)
        alone = [session.generate([t], sampling=sampling, **options)[0] for t in talks]
        assert [r.text for r in together] == [r.text for r in alone]


def test_without_a_backbone_it_composes_trains_saves_and_says_what_text_needs(toy, tmp_path):
    parts = {name: SIGNAL[name] for name in ("encoder", "projector", "codec")}
    loss = {"use": "signal-loss", "of": "signal.codec"}
    model, processor = xoron_core.compose({"signal": {**parts, "loss": loss}})
    media = processor.media_batch("signal.codec", [wave(k) for k in range(8)])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    model.train()
    losses = []
    for _ in range(150):
        output = model(media={"signal.codec": media})
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(float(output.loss.detach()))
    assert losses[-1] < 0.5 * losses[0], (losses[0], losses[-1])
    model.save_pretrained(tmp_path / "m")
    loaded, again = xoron_core.load(tmp_path / "m")
    codes = loaded.call("signal.codec", "encode", **again.media_batch("signal.codec", [wave(3)]))
    assert torch.equal(codes.ids[0], model.part("signal.codec").encode(**media).ids[3])
    assert loaded.call("signal.codec", "decode", codes.ids, codes.metadata).shape == (1, 16)
    for ask_for_text in (
        lambda: loaded.generate(torch.ones(1, 2, dtype=torch.long)),
        lambda: Session(loaded, again).stream("hi"),
    ):
        with pytest.raises(PluginError, match="pip install xoron-llm"):
            ask_for_text()


def test_a_folder_that_needs_the_absent_plugin_names_its_distribution(composed, tmp_path):
    xoron_core.save(*composed, tmp_path / "m")
    out = subprocess.run(  # a process in which the toy was never on the path
        [
            sys.executable,
            "-c",
            "from xoron_core.cli import main; main()",
            "generate",
            tmp_path / "m",
            "x",
        ],
        capture_output=True,
        text=True,
    )
    assert out.returncode == 2
    assert "pip install xoron-toy" in out.stderr
    assert "Traceback" not in out.stderr
