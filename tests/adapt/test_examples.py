"""Pairs: read, split, formatted, packed; the stream protocol and its exact resume."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modicum.adapt.examples import Encoded, Example, Prepared, encode, fit, prepare, read_examples, sample, split
from modicum.adapt.run import run_spec
from modicum.adapt.sources import load_sides
from modicum.adapt.spec import AdaptSpec
from modicum.core.errors import UserError
from modicum.data.document import Document, write_documents
from modicum.data.stream import NO_LOSS, EndOfData, Stream
from modicum.data.tokenizer import Tokenizer

PAIRS = [(f"what is {a} plus {b}?", f"{a} plus {b} is {a + b}.") for a in range(12) for b in range(8)]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: <think></think>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([f"{q} {a}" for q, a in PAIRS], 400)


def with_template(tokenizer: Tokenizer, template: str, *added: str) -> Tokenizer:
    backend = type(tokenizer.backend).from_str(tokenizer.backend.to_str())
    backend.add_special_tokens(list(added))
    stops = [backend.token_to_id(token) for token in added if "end" in token]
    return Tokenizer(backend, eos=tokenizer.eos_token, template=template, stop_ids=stops)


def test_target_is_what_the_template_adds_for_the_answer(tokenizer: Tokenizer) -> None:
    one = encode(Example.of("what is 1 plus 2?", "it is 3."), tokenizer)
    prompt = "<|user|>\nwhat is 1 plus 2?\n<|assistant|>\n"
    assert tokenizer.decode(one.ids[: one.given], skip_special=False) == prompt
    assert tokenizer.decode(one.ids[one.given :], skip_special=False) == "it is 3.<|endoftext|>"


def test_target_ends_with_the_templates_own_end_of_turn(tokenizer: Tokenizer) -> None:
    chatml = with_template(tokenizer, CHATML, "<|im_start|>", "<|im_end|>")
    turns = tuple(
        {"role": r, "content": c}
        for r, c in (
            ("system", "be it"),
            ("user", "1 plus 1?"),
            ("assistant", "2"),
            ("user", "so?"),
            ("assistant", "3"),
        )
    )
    one = encode(Example("x", turns), chatml)
    assert chatml.decode(one.ids[: one.given], skip_special=False).count("<|im_end|>") == 4
    assert chatml.decode(one.ids[one.given :], skip_special=False) == "3<|im_end|>"


def test_a_template_that_rewrites_the_last_turn_still_gives_the_answer(tokenizer: Tokenizer) -> None:
    thinking = with_template(tokenizer, THINKING)
    one = encode(Example.of("why?", "because"), thinking)
    assert thinking.decode(one.ids[: one.given], skip_special=False).endswith("<think></think>")
    assert thinking.decode(one.ids[one.given :], skip_special=False) == "because<|endoftext|>"


def test_long_answers_are_cut_and_long_questions_dropped(tokenizer: Tokenizer) -> None:
    fine = encode(Example.of("a?", "b"), tokenizer)
    length = len(fine)
    some = [Example.of("a?", "b"), Example.of("a?", "b " * 50), Example.of("a " * 50, "b")]
    prepared = prepare(some, tokenizer, length)
    assert (len(prepared.examples), prepared.cut, prepared.dropped) == (2, 1, 1)
    assert all(len(e) <= length and e.given < len(e.ids) for e in prepared.examples)


def test_split_is_by_question_and_stable() -> None:
    examples = [Example.of(q, a) for q, a in PAIRS] + [Example.of(q.upper(), "again") for q, _ in PAIRS]
    train, heldout = split(examples, 0.25)
    assert not {e.key for e in train} & {e.key for e in heldout}
    assert 0.1 < len(heldout) / len(examples) < 0.4
    fewer = split(examples[:50], 0.25)
    assert fewer[1] == [e for e in examples[:50] if e in heldout]  # adding pairs moves none
    assert split(examples, 0.25, seed=1)[1] != heldout
    assert split(examples, 0.0) == (examples, [])
    with pytest.raises(UserError, match="give more pairs"):
        split(examples[:1], 0.1)


def test_sample_is_stable_and_in_order() -> None:
    examples = [Example.of(q, a) for q, a in PAIRS]
    chosen = sample(examples, 10)
    assert len(chosen) == 10 and sample(list(reversed(examples)), 10) == list(reversed(chosen))
    assert sample(examples, None) == sample(examples, 10_000) == examples


def test_jsonl_of_pairs_and_conversations(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [{"question": "q", "answer": "a"}, {"messages": chat, "id": 7}]
    path.write_text("\n\n".join(json.dumps(row) for row in rows))
    first, second = read_examples(path)
    assert first.messages == second.messages == tuple(chat) and second.id == "7"


@pytest.mark.parametrize(
    "line,word",
    [
        ("{", "not JSON"),
        ('{"question": "q"}', "neither"),
        ('["q", "a"]', "neither"),
        ('{"messages": []}', "last of two"),
        ('{"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "q"}]}', "assistant"),
        ('{"messages": [{"role": "user"}, {"role": "assistant", "content": "a"}]}', "content"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, word: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"question": "q", "answer": "a"}\n' + line)
    with pytest.raises(UserError, match=f"line 2.*{word}"):
        read_examples(path)


def test_files_without_pairs(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    for name, word in (("empty.jsonl", "no pairs"), ("binary.jsonl", "UTF-8"), ("none.jsonl", "no file")):
        with pytest.raises(UserError, match=word):
            load_sides(tmp_path / name, 0.1, 0)


def test_a_curated_folder_gives_pairs_of_its_two_sides(tmp_path: Path) -> None:
    def source(name: str) -> str:
        return f'def {name}(x):\n    """Give the {name} of a number to whoever asks."""\n    return x\n'

    for side, names in (("train", ("double", "triple")), ("heldout", ("square",))):
        made = (Document(f"{n}.py", source(n), "code", f"{n}.py", {"language": "python"}) for n in names)
        write_documents(tmp_path / "documents" / f"{side}-00000.parquet", made)
    train, heldout = load_sides(tmp_path, 0.1, 0)
    assert {e.id.split("?")[0] for e in train} == {"double.py", "triple.py"}
    assert {e.id.split("?")[0] for e in heldout} == {"square.py"}
    assert load_sides(tmp_path, 0.0, 0)[1] == []
    with pytest.raises(UserError, match="not a curated folder"):
        load_sides(tmp_path / "documents", 0.1, 0)


def encoded(n: int, longest: int = 30) -> list[Encoded]:
    """Examples of different lengths whose tokens name them: example i holds 1000 i, 1000 i + 1, ..."""
    generator = np.random.default_rng(0)
    sizes = generator.integers(3, longest, n)
    return [
        Encoded(np.arange(1000 * i, 1000 * i + size), int(generator.integers(1, size - 1)))
        for i, size in enumerate(sizes)
    ]


def pair_stream(examples: list[Encoded], length: int, **more: Any) -> Stream:
    """As an adaptation builds it."""
    stream: Stream = AdaptSpec(sequence_length=length).stream(Prepared(examples).documents(), **{"total": None} | more)
    return stream


def test_rows_hold_whole_pairs_with_loss_on_answers_alone() -> None:
    examples = encoded(40)
    stream = pair_stream(examples, 48, epochs=1)
    seen = []
    while True:
        try:
            batch = stream.next_batch(3)
        except EndOfData:
            break
        assert batch.documents_BT is not None
        for tokens, targets, documents, positions in zip(
            batch.tokens_BT, batch.targets_BT, batch.documents_BT, batch.positions_BT, strict=True
        ):
            for k in range(int(documents.max()) + 1):
                inside = documents == k
                i = int(tokens[inside][0]) // 1000
                example = examples[i]
                seen.append(i)
                assert tokens[inside].tolist() == example.ids[:-1].tolist()
                assert positions[inside].tolist() == list(range(len(example)))
                learnt = [int(t) for t in targets[inside] if t != NO_LOSS]
                assert learnt == example.ids[example.given :].tolist()
            assert (targets[documents == -1] == NO_LOSS).all()
    assert sorted(seen) == list(range(40)) and seen != list(range(40))


@pytest.mark.parametrize("stop", [1, 4, 9])
def test_stream_goes_on_exactly(stop: int) -> None:
    def after(stream: Stream, n: int) -> list[list[int]]:
        return [stream.next_batch(3).tokens_BT.flatten().tolist() for _ in range(n)]

    whole = after(pair_stream(encoded(25), 40, seed=3), 14)  # more than two epochs
    first = pair_stream(encoded(25), 40, seed=3)
    begun = after(first, stop)
    second = pair_stream(encoded(25), 40, seed=0)
    second.load_state(json.loads(json.dumps(first.state())))
    assert begun + after(second, 14 - stop) == whole


def test_stream_refuses_other_pairs() -> None:
    state = pair_stream(encoded(10), 40).state()
    with pytest.raises(UserError, match="'pairs' had 10 documents"):
        pair_stream(encoded(11), 40).load_state(state)


def test_epochs_are_as_many_steps_as_their_rows_need() -> None:
    pairs = Prepared(encoded(40))
    rows = pair_stream(pairs.examples, 48, epochs=1).count_rows()
    assert rows == len(list(pair_stream(pairs.examples, 48, epochs=1).batches(1))) > 10
    spec = AdaptSpec(epochs=2.5, batch_sequences=4, sequence_length=64)
    run = run_spec(spec, pairs, 48, 7)
    assert run.total_steps == math.ceil(2.5 * rows / 4) and run.sequence_length == 48 and run.eval_sequences == 7
    assert run.form is None and run.sequences == 4 and str(run.choice("packing")) == "whole"
    assert AdaptSpec().epochs == 3.0 and AdaptSpec(steps=5).epochs is None


def test_fit_drops_a_pair_without_a_given_token() -> None:
    assert fit([Encoded(np.arange(4), 0)], 10).dropped == 1
