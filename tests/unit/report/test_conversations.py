from __future__ import annotations

import dataclasses
from pathlib import Path

from anchorctx.records.transcripts import append_transcript
from anchorctx.report.blocks import Conversation
from anchorctx.report.collect import collect
from anchorctx.report.page import render_page
from anchorctx.report.sections import reuse

from .fixtures import ARMS, make_reuse, transcript


def test_the_worst_problems_of_an_arm_can_be_read(tmp_path: Path):
    """Problem 2 is where dense is right and the arm is wrong, problem 3 has the largest divergence; dense has none."""
    make_reuse(tmp_path / "reuse", "m")
    material = collect([str(tmp_path)])
    section = reuse.build(material)
    assert section is not None
    titles = [block.title for block in section.blocks if isinstance(block, Conversation)]
    others = [arm for arm in ARMS if arm != "dense"]
    assert len(titles) == 2 * len(others) and not [title for title in titles if ", dense, problem" in title]
    for place, arm in enumerate(others, 1):
        wrong, far = (title for title in titles if f", {arm}, " in title)
        assert f"problem 2 of single: wrong, dense right; KL up to {place / 10:.2g} nats" in wrong
        assert f"problem 3 of single: right, dense right; KL up to {place / 5:.2g} nats" in far
    page = render_page("t", material)
    assert "<b>naive" not in page and "&lt;b&gt;naive&lt;/b&gt;" in page and "7 &amp; 8" in page
    assert page.count('<details class="conversation">') == len(titles) and " open>" not in page
    # Of other problems than the rows', of another model, or half a line: not shown.
    file = tmp_path / "reuse" / "transcripts.jsonl"
    lines = [dataclasses.replace(transcript(m, 0), problems=p) for m, p in (("m", "other"), ("n", ""))]
    file.unlink()
    for line in lines:
        append_transcript(file, line)
    file.write_text(file.read_text() + '{"model": "m"')
    section = reuse.build(material)
    assert section is not None and not [block for block in section.blocks if isinstance(block, Conversation)]
