"""A training compiled ahead of time for accelerators that are not there, and what that says about its speed."""
