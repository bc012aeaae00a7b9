"""Whether a run fits, and how it computes: dry run, cost model, planner."""
