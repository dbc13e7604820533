"""`anchorctx kvcomm` on a chat model: whose words its agents read, and what is written down."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from anchorctx.cli.main import main
from anchorctx.data.sources.stdlib import train_tokenizer
from anchorctx.records.results import Rows, read_results
from anchorctx.records.transcripts import read_transcripts
from anchorctx.testing.tiny import save, text_model

CHATML = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
AGENTS = """
gsm8k:
  decision: last
  agents:
    - {name: first, system: Add., user: "Problem:\\n{question} (end)\\n\\nSolve it."}
    - {name: last, system: Decide., user: "Problem:\\n{question} (end)\\n\\n{heard}Decide.", max_new_tokens: 3}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a chat template that reaches past the package's roles, and two questions."""
    path = tmp_path_factory.mktemp("chat")
    tokenizer = train_tokenizer(vocabulary=300, sample_chars=20_000)
    tokenizer.chat_template = CHATML
    save(text_model(tokenizer, 8192), tokenizer, path / "chatty")
    (path / "agents.yaml").write_text(AGENTS)
    rows = [{"question": f"What is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(2)]
    (path / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chat(folder: Path, out: Path, *more: str) -> int:
    """The split of errors is left out: prefix is longer than the model reaches."""
    settings = f"gsm8k={{path: {folder / 'gsm8k.jsonl'}, problems: 2, max_new_tokens: 6}}"
    words = ["tasks=[gsm8k]", "arms=[rotate_glue]", "variation.prefix=4000", "compare_tokens=4", settings]
    return main(["kvcomm", f"model={folder / 'chatty'}", f"out_dir={out}", *words, *more])


def test_a_chat_model_is_told_its_role(folder: Path, tmp_path: Path) -> None:
    """The package's agents by default, a user's in a file, or plain prompts; another file is another study."""
    assert chat(folder, tmp_path / "roles", "gsm8k.problems=1") == 0
    (found,) = read_transcripts(tmp_path / "roles" / "transcripts.jsonl")
    assert list(found.prompts) == ["solver", "checker", "judge"]
    judge = found.prompts["judge"]
    assert judge.startswith("<s>system\nYou are the judge") and judge.endswith("</s>\n<s>assistant\n")
    for agent, said in found.arms["dense"].answers.items():
        assert agent == "judge" or f"{agent} wrote:\n{said} (end of what {agent} wrote)\n\n" in judge
    mine = f"agents.file={folder / 'agents.yaml'}"
    assert chat(folder, tmp_path / "mine", mine, "gsm8k.problems=1") == 0
    (found,) = read_transcripts(tmp_path / "mine" / "transcripts.jsonl")
    assert found.prompts["first"] == (
        "<s>system\nAdd.</s>\n<s>user\nProblem:\nWhat is 0 + 1? (end)\n\nSolve it.</s>\n<s>assistant\n"
    )
    assert chat(folder, tmp_path / "plain", mine, "chat=false", "transcripts=1") == 0
    (found,) = read_transcripts(tmp_path / "plain" / "transcripts.jsonl")
    assert found.prompts["first"] == "<s>Add.\n\nProblem:\nWhat is 0 + 1? (end)\n\nSolve it.\n\nAnswer:"
    (folder / "agents.yaml").write_text(AGENTS.replace("Add.", "Sum."))
    assert chat(folder, tmp_path / "mine", mine, "gsm8k.problems=1") == 2
    (folder / "agents.yaml").write_text(AGENTS)


def test_a_forecast_leaves_no_transcript(folder: Path, tmp_path: Path) -> None:
    assert chat(folder, tmp_path / "none", f"agents.file={folder / 'agents.yaml'}", "--dry-run") == 0
    assert not (tmp_path / "none").exists()


def test_what_was_said_is_kept(folder: Path, tmp_path: Path) -> None:
    """One line a problem, with every arm; what is right and how far an arm is from dense are as in the rows."""
    words = [f"agents.file={folder / 'agents.yaml'}", "arms=[rotate,naive]", "tasks=[gsm8k,copy]"]
    assert chat(folder, tmp_path, *words, "copy={problems: 1, question: 9, prefix: 5, output: 3}") == 0
    rows = Rows(read_results(tmp_path / "results.jsonl"))
    found = read_transcripts(tmp_path / "transcripts.jsonl")
    assert [(t.model, t.task, t.kind, t.problem, t.expected) for t in found] == [
        ("chatty", "gsm8k", "gsm8k", 0, "1"),
        ("chatty", "gsm8k", "gsm8k", 1, "2"),
    ]
    for arm in ("dense", "rotate", "naive"):
        said = [transcript.arms[arm] for transcript in found]
        assert all(list(s.answers) == list(s.kl) == ["first", "last"] for s in said)
        right = rows.find("kvcomm_accuracy", task="gsm8k", arm=arm, kind="all")
        kl = rows.find("kvcomm_kl", task="gsm8k", arm=arm, kind="all", tokens="all")
        assert right is not None and right.context["values"] == [int(s.correct) for s in said]
        assert kl is not None and kl.context["values"] == pytest.approx([np.mean(list(s.kl.values())) for s in said])
        assert {transcript.problems for transcript in found} == {kl.context["problems"]}
    assert main(["report", str(tmp_path), f"out={tmp_path / 'page.html'}"]) == 0
    assert (tmp_path / "page.html").read_text().count('<details class="conversation">') >= 1
