"""Documents to rows: one small file for each policy, each with its picture in docs/data.md."""
