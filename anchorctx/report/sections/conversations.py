"""The problems on which each arm of KV reuse did worst, in the words of the agents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from anchorctx.records.results import Rows
from anchorctx.records.transcripts import FILE, Said, Transcript, read_transcripts
from anchorctx.report.blocks import Conversation, Passage
from anchorctx.report.collect import Material

EACH = 2
"""Problems of an arm that are shown: the one with a wrong answer where dense's is right, and the most divergent one."""
DENSE = "dense"
NOTHING = "(nothing)"


def transcripts_of(material: Material, model: str, rows: Rows) -> list[Transcript]:
    """What was kept of the problems that a model's rows are about; `model` is its name in the report."""
    places = {row.place.path: row.result.model for row in material.rows if row.model == model}
    # Where a task ended early, the number of its problems stands behind the fingerprint.
    measured = {row.context.get("problems", "").partition(":")[0] for row in rows}
    return [
        transcript
        for path, label in places.items()
        for transcript in read_transcripts(path / FILE)
        if transcript.model == label and transcript.problems in measured
    ]


def conversations(name: str, arms: Sequence[str], transcripts: Sequence[Transcript]) -> Iterator[Conversation]:
    """A folded block for the worst problems of each arm; arms that diverge nowhere have none."""
    for arm in arms:
        ran = [transcript for transcript in transcripts if arm in transcript.arms and DENSE in transcript.arms]
        if arm != DENSE:
            yield from (_conversation(name, arm, transcript) for transcript in _worst(arm, ran))


def _worst(arm: str, transcripts: Sequence[Transcript]) -> list[Transcript]:
    # Wrong where dense is right, first; each by the largest divergence of any agent.
    order = sorted(transcripts, key=lambda t: (_broken(t, arm), _divergence(t.arms[arm])), reverse=True)
    farthest = max(transcripts, key=lambda t: _divergence(t.arms[arm]), default=None)
    chosen = [t for t in order[:1] if _broken(t, arm)] + ([farthest] if farthest is not None else [])
    told = [t for t in chosen if _broken(t, arm) or t.arms[arm].answers != t.arms[DENSE].answers]
    return [t for i, t in enumerate(told) if t not in told[:i]][:EACH]


def _broken(transcript: Transcript, arm: str) -> bool:
    return transcript.arms[DENSE].correct and not transcript.arms[arm].correct


def _divergence(said: Said) -> float:
    return max(said.kl.values(), default=0.0)


def _conversation(name: str, arm: str, transcript: Transcript) -> Conversation:
    mine, dense = transcript.arms[arm], transcript.arms[DENSE]
    of = "" if transcript.kind == transcript.task else f" of {transcript.kind}"
    verdict = f"{_verdict(mine)}, dense {_verdict(dense)}; KL up to {_divergence(mine):.2g} nats a token"
    passages = []
    for agent, prompt in transcript.prompts.items():
        passages.append(Passage(f"{agent} is told, in dense's run", prompt, folded=True))
        said, other = dense.answers.get(agent, ""), mine.answers.get(agent, "")
        if said == other:
            passages.append(Passage(f"{agent} says, with dense and with {arm}", said or NOTHING))
            continue
        passages.append(Passage(f"{agent} says, with dense", said or NOTHING))
        heading = f"{agent} says, with {arm} (KL {mine.kl.get(agent, 0.0):.2g})"
        passages.append(Passage(heading, other or NOTHING))
    passages.append(Passage("right is", transcript.expected))
    return Conversation(f"{name}, {arm}, problem {transcript.problem + 1}{of}: {verdict}", passages)


def _verdict(said: Said) -> str:
    return "right" if said.correct else "wrong"
