"""Running code that a model wrote; see `verdict`, and `child` for the processes that it runs in."""

from anchorctx.evals.evaluators.reuse.tasks.sandbox.verdict import CodeProblem, check_sandbox, passes

__all__ = ["CodeProblem", "check_sandbox", "passes"]
