"""The planner: what a run needs, what this machine can do, and the placement that is fastest within the budget."""
