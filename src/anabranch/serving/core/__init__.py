"""What decides: requests, blocks, scheduling, admission. Plain Python, no torch, so that thousands of states are tested in seconds."""
