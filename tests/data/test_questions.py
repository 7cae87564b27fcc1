"""Questions made from signatures and docstrings: every fact by hand, the split by document, the draw."""

from collections import Counter

from modicum.data.document import Document
from modicum.data.python_source import DOC_FORMAT
from modicum.data.questions import draw, questions, split_of

SOURCE = '''
class Reader(Base):
    """Reads rows."""

    def seek(self, offset, whence=0, *, strict=True, codec="utf-8", sep=", ", step=-1, size=LIMIT, key=None, f=len()):
        """Move to a position.

        Raise ValueError if the offset lies before the start. Calls other.thing.
        If the file is closed, raises OSError.
        """

    def tell(self):
        """Return the current position."""

    def long(self):
        """Return the thing that one gets when one has asked for a very long thing."""

    def _hidden(self, a=5):
        """Return the secret."""


class Two(Base, Other):
    """Has two bases."""


class Plain(object):
    """Derives from nothing worth asking for."""
'''


def made(text=SOURCE, name="python/io2.py", **more):
    return list(questions(Document(name, text, "code", name, {"language": "python"} | more)))


def test_every_fact_that_the_source_states_and_no_other():
    found = {q.question: q.answers for q in made()}
    parameter = "What is the default value of the parameter `{}` of `io2.Reader.seek`?"
    assert found == {
        "Which class does the class `io2.Reader` derive from?": ("Base",),
        parameter.format("whence"): ("0",),
        parameter.format("strict"): ("True",),
        parameter.format("codec"): ("utf-8",),
        parameter.format("size"): ("LIMIT",),
        parameter.format("key"): ("None",),
        "Which exception does `io2.Reader.seek` raise if the offset lies before the start?": ("ValueError",),
        "Which exception does `io2.Reader.seek` raise if the file is closed?": ("OSError",),
        "What does `io2.Reader.tell` return?": ("the current position",),
    }, "minus signs, punctuation, calls and long phrases cannot be graded and are not asked"
    assert {q.evidence for q in made()} == {"io2.Reader", "io2.Reader.seek", "io2.Reader.tell"}


def test_language_taken_out_of_source_gives_the_same_questions():
    text = "## m.f(x, n=3)\n\nReturn the sum of both.\n\n## class m.C(Base)\n\nA class."
    found = {q.question: q.answers[0] for q in made(text, format=DOC_FORMAT)}
    assert found == {
        "What is the default value of the parameter `n` of `m.f`?": "3",
        "What does `m.f` return?": "the sum of both",
        "Which class does the class `m.C` derive from?": "Base",
    }


def test_a_fact_is_asked_once_though_overrides_repeat_it():
    text = """
class A(B):
    "A."
    def f(self, n=3):
        "Do it."
class C(D):
    "C."
    def f(self, n=3):
        "Do it."
    def g(self, n=3):
        "Do it."
"""
    assert [q.evidence for q in made(text) if q.kind == "default"] == ["io2.A.f", "io2.C.g"]


def test_documents_are_on_one_side_and_both_sides_are_used():
    found = [q for i in range(200) for q in made(name=f"python/m{i}.py")]
    sides = {}
    for q in found:
        sides.setdefault(q.document, set()).add(split_of(q))
    assert all(len(side) == 1 for side in sides.values())
    count = Counter(next(iter(side)) for side in sides.values())
    assert set(count) == {"dev", "test"} and 40 <= count["dev"] <= 80


def test_the_draw_takes_kinds_in_turn_and_no_answer_too_often():
    text = "".join(
        f"def f{i}(a{i}=None, b{i}={i}):\n    'Return the row {i}.'\nclass C{i}(B{i}):\n    'C.'\n" for i in range(100)
    )
    pool = made(text)
    drawn = draw(pool, 40, seed=1)
    assert len(drawn) == 40 == len({q.id for q in drawn})
    assert drawn == draw(list(reversed(pool)), 40, seed=1), "the order of the documents does not matter"
    assert drawn != draw(pool, 40, seed=2)
    kinds = Counter(q.kind for q in drawn)
    assert kinds["default"] == 14 and kinds["returns"] == kinds["base"] == 13
    assert Counter(q.answers[0] for q in drawn)["None"] <= 4
    assert len(draw(made(), 100)) == len(made()), "a limit beyond the pool gives all of it"
