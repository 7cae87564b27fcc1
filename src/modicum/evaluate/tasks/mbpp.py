"""mbpp: small Python functions from a sentence, run against three tests in a sandbox.

    You are an expert Python programmer, and here is your task: {text} Your code should pass these tests:

    {test}
    {test}
    {test}
    [BEGIN]
    {code}
    [DONE]

`accuracy` is the share of replies whose code passes every test (pass@1). The code runs isolated (`evaluate.sandbox`);
where the kernel cannot isolate it the task is refused, unless `unsafe=true`. `unparsed` counts replies without a
definition. A row: text, code and test_list of the data set, or prompt, references and `extra.tests`; the published
figures are of 500 test rows with three examples.

Austin et al. 2021, arXiv:2108.07732. Wording of lm-evaluation-harness.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modicum.evaluate import sandbox
from modicum.evaluate.multiple_choice import first
from modicum.evaluate.rows import FileConfig
from modicum.evaluate.tasks import Doc
from modicum.evaluate.written import Written, WrittenTask, extra_of

NOT_MEASURABLE = "its questions are no part of modicum; modicum eval --tasks mbpp --data FOLDER asks them"


@dataclass(frozen=True, kw_only=True)
class Config(FileConfig):
    seconds: float = 5.0  # of the clock for each reply's code and tests
    unsafe: bool = False  # run it where the kernel cannot isolate it

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seconds <= 0:
            raise ValueError("seconds must be above 0")


TOY = Config(file=str(Path(__file__).parent / "examples" / "functions.jsonl"))


class Mbpp(WrittenTask):
    config: Config
    stop = ("[DONE]",)
    max_new_tokens = 256

    def question(self, row: dict[str, Any], where: str) -> Written:
        extra = extra_of(row)
        tests = list(row.get("test_list") or extra.get("tests") or first(row, ("tests",), where))
        code = row.get("code") or first(row, ("references",), where)
        code = str(code[0] if isinstance(code, list) else code).replace("\r", "")
        text = first(row, ("text", "prompt"), where)
        shown = "\n".join(tests[:3])
        prompt = (
            f"You are an expert Python programmer, and here is your task: {text} Your code should pass these tests:\n\n"
            f"{shown}\n[BEGIN]\n"
        )
        setup = str(row.get("test_setup_code") or extra.get("setup") or "")
        return Written(prompt, [code], f"{code}\n[DONE]", extra={"tests": tests, "setup": setup})

    def mark(self, reply: str, doc: Doc) -> dict[str, float]:
        code = reply.strip("\n")
        if "def " not in code and "lambda" not in code and "class " not in code:
            return {"accuracy": 0.0, "unparsed": 1.0}
        tests = [doc["extra"]["setup"], *doc["extra"]["tests"]]
        verdict = sandbox.run(code, tests, seconds=self.config.seconds, unsafe=self.config.unsafe)
        return {"accuracy": float(verdict.passed), "unparsed": 0.0}
